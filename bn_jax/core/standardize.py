"""Normalization by the batch's own moments, and its derivative.

y = γ r (x - μ) + β with r = 1/√(σ² + ε) depends on x also through μ and σ². Differentiated step by
step, reverse mode would keep several arrays of x's size. Here two steps see all of x: `local_sums`
makes what moments are made of, `whiten` makes y by given moments. Each has a rule that keeps x
itself, in its own dtype, and a few numbers per feature. Between them are only numbers per feature,
and the collectives over replicas, which JAX differentiates by itself.

With tangents ẋ, γ̇, β̇, ε̇, and E the mean over the batch,

    μ̇ = E[ẋ],   (σ²)˙ = 2 Re E[(x - μ)* ẋ],                          (by `local_sums`)
    ṙ = -r³ ((σ²)˙ + ε̇)/2,
    ẏ = γr (ẋ - μ̇) + (γ̇r + γṙ)(x - μ) + β̇.                          (by `whiten`)

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
from jax.typing import ArrayLike

from bn_jax.core.axes import Axes, collapse, feature_shape, spread
from bn_jax.core.moments import Moments, moments_of
from bn_jax.core.normalize import BatchNormParams, inverse_std, transform
from bn_jax.core.origin import origin_of
from bn_jax.core.replicas import Replicas, sum_over
from bn_jax.core.stored import stored
from bn_jax.core.sums import Sums, add_up, center, without_padding
from bn_jax.core.together import spread_together


def standardize(
    axes: Axes,
    replicas: Replicas | None,
    x: Array,
    params: BatchNormParams,
    epsilon: ArrayLike,
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
    # collectives stand outside of the rules.
    near = moments_of(sum_over(local_sums(axes, x, wide, origin, weights), replicas))
    y = whiten(axes, x, wide, origin, near, params, epsilon, weights)
    statistics = lax.stop_gradient((origin, near))
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
    weights_dot = None if is_zero(weights_dot) else weights_dot
    return sums, push_sums(axes, x, origin, weights, instantiate(wide_dot), weights_dot)


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
    near: Moments,
    params: BatchNormParams,
    epsilon: ArrayLike,
    weights: Array | None,
) -> Array:
    """Y in x's dtype, by the moments of x - origin."""
    deviation = without_padding(center(x, origin, axes) - spread(near.mean, x, axes), x, weights)
    return transform(deviation, inverse_std(near.var, epsilon), params, axes).astype(x.dtype)


@functools.partial(whiten.defjvp, symbolic_zeros=True)
def whiten_jvp(
    axes: Axes, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    """The tangents of all but origin and weights, pushed through the map."""
    x, _, origin, near, params, epsilon, weights = primals
    _, wide_dot, _, *dots, _ = tangents
    dots = (
        None if is_zero(wide_dot) else wide_dot,
        *jax.tree.map(instantiate, dots, is_leaf=is_zero),
    )
    y = whiten.fun(axes, *primals)
    return y, push_whiten(axes, x, origin, near, params, epsilon, weights, *dots)


@once
def push_whiten(
    axes: Axes,
    x: Array,
    origin: Array,
    near: Moments,
    params: BatchNormParams,
    epsilon: Array,
    weights: Array | None,
    wide_dot: Array | None,
    near_dot: Moments,
    params_dot: BatchNormParams,
    epsilon_dot: Array,
) -> Array:
    """ẏ in x's dtype; ẋ may be None for zero."""
    wide, mean = origin.dtype, near.mean
    r = inverse_std(near.var, epsilon)
    scale = jnp.ones_like(origin) if params.scale is None else params.scale.astype(wide)
    # Factor by factor: r³ itself leaves float32's range where the spread is beyond 1e±13.
    r_dot = -0.5 * (r * (r * (r * (near_dot.var + epsilon_dot))))
    r, r_dot = r.astype(wide), r_dot.astype(wide)
    slope, gain = scale * r_dot, scale * r
    if params_dot.scale is not None:
        slope = slope + params_dot.scale.astype(wide) * r

    # Products with μ are taken per feature, so that they transpose into the sum that β̇ does: of g.
    move = -(mean * slope + gain * near_dot.mean)
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


def instantiate(tangent: Any) -> Array:
    """A tangent as an array, also if it is zero."""
    return jnp.zeros(tangent.shape, tangent.dtype) if is_zero(tangent) else tangent
