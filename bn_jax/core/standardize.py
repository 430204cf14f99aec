"""Normalization by the batch's own moments, and its derivative.

y = γ r (x - μ) + β with r = 1/√(σ² + ε) depends on x also through μ and σ². Differentiated step by
step, reverse mode would keep several arrays of x's size; the rule below keeps x itself, in its own
dtype, and a few numbers per feature.

With tangents ẋ, γ̇, β̇, ε̇, and E the mean over the batch,

    μ̇ = E[ẋ],   (σ²)˙ = 2 Re E[(x - μ)* ẋ],   ṙ = -r³ ((σ²)˙ + ε̇)/2,
    ẏ = γr (ẋ - μ̇) + (γ̇r + γṙ)(x - μ) + β̇.

That map is linear in the tangents. JAX transposes it into the paper's backward pass (Ioffe &
Szegedy 2015, section 3; g = ∂L/∂y),

    ∂L/∂β = Σ g,   ∂L/∂γ = Σ g x̂,   ∂L/∂x = γr (g - E[g] - x̂ E[g x̂])   with x̂ = r (x - μ),

and differentiates it again for every higher order: nothing is stopped but the origin, on which
nothing depends.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from bn_jax.core.apart import apart
from bn_jax.core.axes import Axes, collapse, feature_shape, spread
from bn_jax.core.moments import Moments, moments_of
from bn_jax.core.normalize import BatchNormParams, inverse_std, transform
from bn_jax.core.replicas import Replicas
from bn_jax.core.sums import add_up, center, origin_of, share, square, without_padding


def standardize(
    axes: Axes,
    replicas: Replicas | None,
    x: Array,
    params: BatchNormParams,
    epsilon: ArrayLike,
    weights: Array | None,
) -> tuple[Array, Array, Moments]:
    """Y in x's dtype, an origin near the mean, and the moments of x - origin.

    No gradient flows through origin and moments.
    """
    shape, features = x.shape, feature_shape(x, axes)
    x, axes = collapse(x, axes)
    weights = None if weights is None else weights.reshape(x.shape)
    params = jax.tree.map(lambda values: values.reshape(feature_shape(x, axes)), params)
    y, *statistics = normalized(axes, replicas, x, params, epsilon, weights)
    return y.reshape(shape), *jax.tree.map(lambda part: part.reshape(features), statistics)


def forward(
    axes: Axes,
    replicas: Replicas | None,
    x: Array,
    params: BatchNormParams,
    epsilon: ArrayLike,
    weights: Array | None,
) -> tuple[Array, Array, Moments]:
    """The same, of an array of at most six axes.

    BN(x) = BN(x - origin): about the origin all statistics are small numbers, and none of them is
    rounded at the size of the mean.
    """
    origin = origin_of(x, axes, weights, replicas)
    near = moments_of(add_up(x, origin, axes, weights, replicas))
    deviation = without_padding(center(x, origin, axes) - spread(near.mean, x, axes), x, weights)
    y = transform(deviation, inverse_std(near.var, epsilon), params, axes)
    return y.astype(x.dtype), origin, near


normalized = jax.custom_jvp(forward, nondiff_argnums=(0, 1))


@functools.partial(normalized.defjvp, symbolic_zeros=True)
def normalized_jvp(
    axes: Axes, replicas: Replicas | None, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The rule of the module's docstring."""
    y, origin, near = forward(axes, replicas, *primals)
    x_dot, params_dot, epsilon_dot, weights_dot = tangents
    dots = (
        None if is_zero(x_dot) else x_dot,
        jax.tree.map(instantiate, params_dot, is_leaf=is_zero),
        instantiate(epsilon_dot),
        None if weights_dot is None or is_zero(weights_dot) else weights_dot,
    )
    # What goes into the checkpoint is x and numbers per feature: no more is kept for transposing.
    push = jax.checkpoint(functools.partial(push_forward, axes, replicas), prevent_cse=False)
    y_dot = push(origin, near, primals, dots)
    return (y, origin, near), (y_dot, *jax.tree.map(jnp.zeros_like, (origin, near)))


def push_forward(
    axes: Axes,
    replicas: Replicas | None,
    origin: Array,
    near: Moments,
    primals: tuple[Any, ...],
    dots: tuple[Any, ...],
) -> Array:
    """ẏ in x's dtype; ẋ and the tangent of the weights may be None for zero."""
    (x, params, epsilon, weights), (x_dot, params_dot, epsilon_dot, weights_dot) = primals, dots
    wide = origin.dtype
    (x, origin, mean), (again, origin_again, _) = apart((x, origin, near.mean), 2)
    r = inverse_std(near.var, epsilon)
    scale = jnp.ones_like(origin) if params.scale is None else params.scale.astype(wide)
    mean_dot, var_dot = jnp.zeros_like(mean), jnp.zeros_like(near.var)

    if x_dot is not None or weights_dot is not None:
        # Widened once, so that what is transposed is summed in full precision and rounded once.
        x_dot = jnp.zeros(x.shape, wide) if x_dot is None else x_dot.astype(wide)
        at, along = (again.astype(wide), weights), (x_dot, weights_dot)
        if weights_dot is None:
            at, along = at[:1], along[:1]
        _, dot = jax.jvp(lambda x, w=weights: add_up(x, origin_again, axes, w, replicas), at, along)
        # With d = x - origin, μ = origin + E[d] and σ² = E|d|² - |E[d]|².
        each = share(jnp.ones_like(near.count), near.count)
        mean_dot = each.astype(wide) * (dot.total - mean * dot.count.astype(wide))
        square_dot = each * (dot.square - (near.var + square(mean)) * dot.count)
        var_dot = square_dot - 2 * jnp.real(jnp.conj(mean) * mean_dot)

    # Factor by factor: r³ itself leaves float32's range where the spread is beyond 1e±13.
    r_dot = -0.5 * (r * (r * (r * (var_dot + epsilon_dot))))
    r, r_dot = r.astype(wide), r_dot.astype(wide)
    slope, gain = scale * r_dot, scale * r
    if params_dot.scale is not None:
        slope = slope + params_dot.scale.astype(wide) * r

    # Products with μ are taken per feature, so that they transpose into the sum that β̇ does: of g.
    y_dot = without_padding(center(x, origin, axes), x, weights) * spread(slope, x, axes)
    if x_dot is not None:
        y_dot = y_dot + x_dot * spread(gain, x, axes)
    # Padding stays at the mean when the mean moves.
    y_dot = y_dot + spread(-(mean * slope + gain * mean_dot), x, axes)
    y_dot = without_padding(y_dot, x, weights)
    if params_dot.bias is not None:
        y_dot = y_dot + spread(params_dot.bias.astype(wide), x, axes)
    return y_dot.astype(x.dtype)


def is_zero(tangent: Any) -> bool:
    """Whether JAX knows a tangent to be zero."""
    return isinstance(tangent, SymbolicZero)


def instantiate(tangent: Any) -> Array:
    """A small tangent as an array, also if it is zero."""
    return jnp.zeros(tangent.shape, tangent.dtype) if is_zero(tangent) else tangent
