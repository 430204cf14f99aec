"""Normalization by the batch's own moments, and its derivative.

y = γ r (x - μ) + β with r = 1/√(σ² + ε) depends on x also through μ and σ². Differentiated step by
step, reverse mode would keep several arrays of x's size. Here two steps see all of x: `local_sums`
makes what moments are made of, S₁ = Σ d and S₂ = Σ |d|² of d = x - origin; `whiten` makes y by
them. Each has a rule that keeps x itself, in its own dtype, and a few numbers per feature. Between
them is only the collective over replicas, which JAX differentiates by itself.

With tangents ẋ, γ̇, β̇, ε̇, of m values whose mean is μ (about the origin),

    Ṡ₁ = Σ ẋ,   Ṡ₂ = 2 Re Σ d* ẋ,                                    (by `local_sums`)
    μ̇ = Ṡ₁/m,   (σ²)˙ = Ṡ₂/m - 2 Re μ* μ̇,
    ṙ = -r³ ((σ²)˙ + ε̇)/2,
    ẏ = γr (ẋ - μ̇) + (γ̇r + γṙ)(d - μ) + β̇.                          (by `whiten`)

That map is linear in the tangents. JAX transposes it into the paper's backward pass (Ioffe &
Szegedy 2015, section 3; g = ∂L/∂y),

    ∂L/∂β = Σ g,   ∂L/∂γ = Σ g x̂,   ∂L/∂x = γr (g - E[g] - x̂ E[g x̂])   with x̂ = r (x - μ),

and differentiates it again for every higher order: nothing is stopped but the origin, on which
nothing depends.

Both steps take x twice: as it is, for its values, and in the dtype of statistics, for its tangents.
What flows back from both is so added in full precision and rounded once, and no wide copy is kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from bn_jax.core.axes import Axes, collapse, feature_shape, spread
from bn_jax.core.moments import (
    Moments,
    degrees_of_freedom,
    mean_and_var,
    moments_of,
    push_mean_and_var,
)
from bn_jax.core.normalize import BatchNormParams, inverse_std, transform
from bn_jax.core.origin import origin_of
from bn_jax.core.replicas import Replicas, sum_over
from bn_jax.core.rounded import rounded
from bn_jax.core.stored import stored
from bn_jax.core.sums import Sums, add_up, center, count_or_all, for_each, without_padding
from bn_jax.core.together import spread_together


def standardize(
    axes: Axes,
    replicas: Replicas | None,
    x: Array,
    params: BatchNormParams,
    epsilon: Array,
    weights: Array | None,
) -> tuple[Array, Array, Moments]:
    """Y in x's dtype, an origin near the mean, and the moments of x - origin.

    BN(x) = BN(x - origin): about the origin all statistics are small numbers, and none of them is
    rounded at the size of the mean. No gradient flows through origin and moments.
    """
    shape, features = x.shape, feature_shape(x, axes)
    x, axes = collapse(stored(x), axes)
    weights = None if weights is None else weights.reshape(x.shape)
    params = jax.tree.map(lambda values: values.reshape(feature_shape(x, axes)), params)
    origin = origin_of(x, axes, weights, replicas)
    wide = x.astype(origin.dtype)
    # JAX runs a rule when it differentiates, by when vmap may have taken its name away: the
    # collective stands outside of the rules.
    sums = local_sums(axes, x, wide, origin, weights)
    if replicas is not None:
        count = for_each(count_or_all(sums.count, x, axes), x, axes)
        sums = sum_over(sums._replace(count=count), replicas)
    y = whiten(axes, x, wide, origin, sums, params, epsilon, weights)
    statistics = origin, moments_of(lax.stop_gradient(sums), x, axes)
    return y.reshape(shape), *jax.tree.map(lambda part: part.reshape(features), statistics)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def local_sums(axes: Axes, x: Array, wide: Array, origin: Array, weights: Array | None) -> Sums:
    """The sums of x - origin, of this member alone."""
    return add_up(x, origin, axes, weights)


@functools.partial(local_sums.defjvp, symbolic_zeros=True)
def local_sums_jvp(
    axes: Axes, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The tangents of wide and weights, pushed through the sums."""
    (x, _, origin, weights), (_, wide_dot, _, weights_dot) = primals, tangents
    sums = add_up(x, origin, axes, weights)
    dots = instantiate(wide_dot), unless_zero(weights_dot)
    return sums, push_sums(axes, x, origin, weights, *dots)


# What goes into a checkpoint is x and numbers per feature: no more is kept for transposing. As one
# function with static arguments, it is traced and transposed once for all layers of one shape.
once = functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)


@once
def push_sums(
    axes: Axes,
    x: Array,
    origin: Array,
    weights: Array | None,
    wide_dot: Array,
    weights_dot: Array | None,
) -> Sums:
    """The tangents of the sums; that of the weights may be None for zero."""
    at, along = (x.astype(origin.dtype), weights), (wide_dot, weights_dot)
    if weights_dot is None:
        at, along = at[:1], along[:1]
    return jax.jvp(lambda x, w=weights: add_up(x, origin, axes, w), at, along)[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def whiten(
    axes: Axes,
    x: Array,
    wide: Array,
    origin: Array,
    sums: Sums,
    params: BatchNormParams,
    epsilon: Array,
    weights: Array | None,
) -> Array:
    """Y in x's dtype, by the sums of x - origin."""
    mean, var = mean_and_var(sums, count_or_all(sums.count, x, axes))
    r = inverse_std_of(var, epsilon, sums, weights)
    return whiten_by(axes, x, origin, mean, r, params, weights)


def inverse_std_of(var: Array, epsilon: Array, sums: Sums, weights: Array | None) -> Array:
    """1/√(σ² + ε), and 0 where the weights leave a single value, or none: so y = β.

    Its variance of 0 says nothing about the data; by 1/√ε, rows that are masked out would come out
    a hundred times too large.
    """
    r = inverse_std(var, epsilon)
    if weights is None:
        return r  # shapes tell
    left = degrees_of_freedom(sums.count, sums.squares)
    return lax.select(left > 0, r, jnp.zeros_like(r))


def whiten_by(
    axes: Axes,
    x: Array,
    origin: Array,
    mean: Array,
    r: Array,
    params: BatchNormParams,
    weights: Array | None,
) -> Array:
    """Y in x's dtype, by the mean of x - origin and r."""
    deviation = without_padding(center(x, origin, axes) - spread(mean, x, axes), x, weights)
    return rounded(transform(deviation, r, params, axes), x.dtype)


@functools.partial(whiten.defjvp, symbolic_zeros=True)
def whiten_jvp(
    axes: Axes, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    """The tangents of all but origin and weights, pushed through the map."""
    x, _, origin, sums, params, epsilon, weights = primals
    _, wide_dot, _, sums_dot, *dots, _ = tangents
    mean, var = mean_and_var(sums, count_or_all(sums.count, x, axes))
    r = inverse_std_of(var, epsilon, sums, weights)
    y = whiten_by(axes, x, origin, mean, r, params, weights)
    sums_dot = sums_dot._replace(count=unless_zero(sums_dot.count), squares=None)
    dots = jax.tree.map(instantiate, (sums_dot, *dots), is_leaf=is_zero)
    at = (x, origin, mean, var, sums.count, r, params, weights)
    return y, push_whiten(axes, *at, unless_zero(wide_dot), *dots)


@once
def push_whiten(
    axes: Axes,
    x: Array,
    origin: Array,
    mean: Array,
    var: Array,
    count: Array | None,
    r: Array,
    params: BatchNormParams,
    weights: Array | None,
    wide_dot: Array | None,
    sums_dot: Sums,
    params_dot: BatchNormParams,
    epsilon_dot: Array,
) -> Array:
    """ẏ in x's dtype; ẋ and that of the count may be None for zero."""
    wide = origin.dtype
    mean_dot, var_dot = push_mean_and_var(mean, var, count_or_all(count, x, axes), sums_dot)
    # Factor by factor: r³ itself leaves float32's range where the spread is beyond 1e±13.
    r_dot = (-0.5 * (r * (r * (r * (var_dot + epsilon_dot))))).astype(wide)
    r = r.astype(wide)
    scale = jnp.ones_like(origin) if params.scale is None else params.scale.astype(wide)
    slope, gain = scale * r_dot, scale * r
    if params_dot.scale is not None:
        slope = slope + params_dot.scale.astype(wide) * r

    # Products with μ are taken per feature, so that they transpose into the sum that β̇ does: of g.
    move = -(mean * slope + gain * mean_dot)
    bias = [] if params_dot.bias is None else [params_dot.bias.astype(wide)]
    if weights is None and bias:
        move = move + bias.pop()
    slope, move, *bias = spread_together([slope, move, *bias], x, axes)
    y_dot = without_padding(center(x, origin, axes), x, weights) * slope
    if wide_dot is not None:
        y_dot = y_dot + wide_dot * spread(gain, x, axes)
    # Padding stays at the mean when the mean moves, and moves with β.
    y_dot = without_padding(y_dot + move, x, weights)
    return (y_dot + bias[0] if bias else y_dot).astype(x.dtype)


def is_zero(tangent: Any) -> bool:
    """Whether JAX knows a tangent to be zero."""
    return isinstance(tangent, SymbolicZero)


def unless_zero(tangent: Any) -> Array | None:
    """A tangent as an array, or None where it is known to be zero."""
    return None if is_zero(tangent) else tangent


def instantiate(tangent: Any) -> Array:
    """A tangent as an array, also if it is zero."""
    return jnp.zeros(tangent.shape, tangent.dtype) if is_zero(tangent) else tangent
