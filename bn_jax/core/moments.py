"""What does this batch look like? Mean, variance, and of how many values.

Three instances: the statistics of a mini-batch (Algorithm 1 of Ioffe & Szegedy 2015, lines 1-2),
those of a batch spread over eight devices, those of a whole data set seen batch by batch. They
are one thing, because moments form a commutative monoid: `merge` joins two disjoint sets of
values, and moments with count 0 are its identity.

Everything here is computed about an *origin* near the mean. E[x²] - E[x]² cancels when the mean is
large against the spread, and even an exact mean cannot be stored exactly; but the statistics of
x - origin are small numbers, and x - origin itself is exact for the values near the origin.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Inexact, Shaped

from bn_jax.core.axes import (
    Axes,
    batch_axes,
    batch_size,
    collapse,
    feature_axes,
    feature_shape,
    spread,
    spread_where,
)
from bn_jax.core.dtypes import real_dtype, statistics_dtype

AxisName = str | tuple[str, ...]


class Moments(NamedTuple):
    """Mean, biased variance and count, one of each per feature.

    Attributes:
        mean: E[x], at least float32 (complex for complex data).
        var: E[|x - E[x]|²], biased (1/m) as in Algorithm 1; real, never negative.
        count: m, the number of values or the sum of their weights; 0 means "nothing seen", and
            then mean and var are 0.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Float[Array, "*features"]  # pyright: ignore[reportIncompatibleMethodOverride]


class Sums(NamedTuple):
    """What moments are made of: additive over disjoint sets of values.

    Attributes:
        total: Σ w d, of deviations d from an origin.
        square: Σ w |d|².
        count: Σ w.
    """

    total: Inexact[Array, "*features"]
    square: Float[Array, "*features"]
    count: Float[Array, "*features"]  # pyright: ignore[reportIncompatibleMethodOverride]


def measure(
    x: Shaped[Array | np.ndarray, "..."],
    *,
    feature_axis: int | Sequence[int] = -1,
    where: Shaped[Array | np.ndarray, "..."] | None = None,
) -> Moments:
    """The moments of each feature of one array.

    μ = (1/m) Σ wᵢ xᵢ,  σ² = (1/m) Σ wᵢ |xᵢ - μ|²,  m = Σ wᵢ  (Algorithm 1, lines 1-2, with w = 1).

    Args:
        x: float or complex, any shape.
        feature_axis: the axes that are kept, negatives allowed.
        where: which values count: a bool mask or non-negative float weights, of x's shape, of x's
            shape without its feature axes, or broadcastable to either. What is excluded may hold
            anything, NaN included. A weight of k means the same as repeating the value k times.

    Returns:
        Moments of the features' shape, in at least float32.

    Raises:
        TypeError: x is not inexact, or where is neither bool nor float.
        ValueError: an axis or the shape of where does not fit x.

    >>> import jax.numpy as jnp
    >>> m = measure(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> m.mean.tolist(), m.var.tolist(), m.count.tolist()
    ([2.0, 20.0], [1.0, 100.0], [2.0, 2.0])
    """
    x = jnp.asarray(x)
    axes = feature_axes(x, feature_axis)
    features = feature_shape(x, axes)
    weights = None if where is None else spread_where(where, x, axes)
    x, axes = collapse(x, axes)
    weights = None if weights is None else weights.reshape(x.shape)
    origin = origin_of(x, axes, weights)
    moments = shift(moments_of(add_up(center(x, origin, axes), axes, weights)), origin)
    return Moments(*(part.reshape(features) for part in moments))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two disjoint sets of values taken together (Chan, Golub & LeVeque 1979).

    With n = nₐ + n_b, the shares p = nₐ/n and q = n_b/n, and δ = μ_b - μₐ:
    μ = pμₐ + qμ_b,  σ² = pσₐ² + qσ_b² + pq|δ|².

    Associative and commutative up to rounding; moments with count 0 are the identity.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(12.0).reshape(6, 2)
    >>> halves = merge(measure(x[:2]), measure(x[2:]))
    >>> [bool(jnp.allclose(p, q)) for p, q in zip(halves, measure(x))]
    [True, True, True]
    """
    count = a.count + b.count
    share_a, share_b = share(a.count, count), share(b.count, count)
    difference = b.mean - a.mean
    # Step from the larger set: when it is all there is, the step is exactly zero.
    mean = jnp.where(
        share_b <= share_a,
        a.mean + share_b.astype(difference.dtype) * difference,
        b.mean - share_a.astype(difference.dtype) * difference,
    )
    var = share_a * a.var + share_b * b.var + share_a * share_b * square(difference)
    return Moments(mean, var, count)


def pool(moments: Moments, axis_name: AxisName) -> Moments:
    """The moments over all members of a named axis (or several) of vmap, shard_map or pmap.

    Each member's count weighs its share, so members may be uneven or empty. All members get the
    same result, which shard_map may return as replicated. Two collectives: one agrees on an
    origin, one sums.

    Args:
        moments: of this member.
        axis_name: the name or names to pool over.

    Raises:
        NameError: axis_name is not bound here.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.arange(12.0).reshape(3, 2, 2)
    >>> pooled = jax.vmap(lambda x: pool(measure(x), "shards"), axis_name="shards")(x)
    >>> pooled.mean.tolist() == [measure(x).mean.tolist()] * 3
    True
    """
    origin = shared_origin(moments.mean, moments.count, axis_name)
    mean, var, count = moments._replace(mean=moments.mean - origin)
    sums = Sums(count.astype(mean.dtype) * mean, count * (var + square(mean)), count)
    return shift(moments_of(lax.psum(sums, axis_name)), origin)


# The pieces from which `measure`, `pool` and `batch_norm` are put together.


def origin_of(
    x: Array, axes: Axes, weights: Array | None, axis_name: AxisName | None = None
) -> Array:
    """A point per feature near the mean: the mean as a plain sum gives it, rounded as it may be.

    A constant: moments do not depend on the origin, so no derivative of any order flows through.
    A constant feature differs from its origin by a few units in the last place; sums of those are
    exact, so that it comes out with variance 0 and normalizes to exactly 0. Weighted sums are not;
    there, a second step lands on the constant itself.

    With axis_name, all members get the same origin.
    """
    x, weights = lax.stop_gradient((x, weights))
    origin = jnp.zeros(feature_shape(x, axes), statistics_dtype(x.dtype))
    count = jnp.zeros_like(origin, real_dtype(origin.dtype))
    for _ in range(1 if weights is None or weights.dtype == bool else 2):
        near = moments_of(add_up(center(x, origin, axes), axes, weights))
        origin, count = shift(near, origin).mean, near.count
    return origin if axis_name is None else shared_origin(origin, count, axis_name)


def shared_origin(origin: Array, count: Array, axis_name: AxisName) -> Array:
    """The mean of all members' origins, each weighed by its count: near the mean of all values."""
    origin, count = lax.stop_gradient((origin, count))
    return share(*lax.psum((count.astype(origin.dtype) * origin, count), axis_name))


def center(x: Array, origin: Array, axes: Axes) -> Array:
    """X - origin in the dtype of statistics."""
    return x.astype(origin.dtype) - spread(origin, x, axes)


def without_padding(values: Array, x: Array, weights: Array | None) -> Array:
    """Values, and 0 where x weighs nothing and is not finite: padding may hold anything."""
    if weights is None:
        return values
    harmless = counts(weights) | jnp.isfinite(x)
    return jnp.where(harmless, values, jnp.zeros_like(values))


def add_up(
    centered: Array, axes: Axes, weights: Array | None, axis_name: AxisName | None = None
) -> Sums:
    """The sums from which moments are made, in one pass; over a named axis in one collective."""
    reduced, real = batch_axes(centered, axes), real_dtype(centered.dtype)
    if weights is None:
        count = jnp.full(feature_shape(centered, axes), batch_size(centered, axes), real)
        sums = Sums(add_over(centered, reduced), add_over(square(centered), reduced), count)
    else:
        kept = jnp.where(counts(weights), centered, jnp.zeros_like(centered))
        weights = weights.astype(real)
        sums = Sums(
            add_over(weights.astype(kept.dtype) * kept, reduced),
            add_over(weights * square(kept), reduced),
            add_over(weights, reduced),
        )
    return sums if axis_name is None else lax.psum(sums, axis_name)


def add_over(values: Array, axes: Axes) -> Array:
    """Sum over the inner axes, then over the outermost.

    The CPU of jaxlib 0.8, and of later ones for small arrays, adds several axes up one number after
    the other, which loses digits. The barrier keeps XLA from making one sum of the two.
    """
    if len(axes) > 1:
        values = lax.optimization_barrier(jnp.sum(values, axes[1:]))
    return jnp.sum(values, axes[:1])


def moments_of(sums: Sums) -> Moments:
    """Moments of data whose mean is near zero: E|d|² - |E d|² then cancels nothing."""
    mean = share(sums.total, sums.count)
    var = share(sums.square, sums.count) - square(mean)
    return Moments(mean, jnp.maximum(var, jnp.zeros_like(var)), sums.count)


def shift(moments: Moments, by: Array) -> Moments:
    """The moments of x + by; where nothing was seen, nothing moves."""
    seen = moments.count > 0
    return moments._replace(mean=jnp.where(seen, moments.mean + by, moments.mean))


def counts(weights: Array) -> Array:
    """Which values weigh anything."""
    return weights if weights.dtype == bool else weights > 0


def share(part: Array, whole: Array) -> Array:
    """Part / whole, correctly rounded, and 0 of nothing without a NaN on the way.

    Of a constant divisor XLA would make a multiplication by the rounded reciprocal, and fuse that
    into the subtractions that use the quotient, each in its own way: two means, a bit apart, of
    one batch. A divisor that is part where part is NaN says the same and is no constant.
    """
    safe = jnp.where(whole > 0, whole, jnp.ones_like(whole)).astype(part.dtype)
    return part / jnp.where(jnp.isnan(part), lax.stop_gradient(part), safe)


def square(x: Array) -> Array:
    """|x|², real."""
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else x * x
