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

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Inexact, Shaped

from bn_jax.core.apart import apart
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
    moments = shift(moments_of(add_up(x, origin, axes, weights)), origin)
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
    """A point per feature near the mean: that of a pilot, or of all values where they are weighed.

    A constant: moments do not depend on the origin, so no derivative of any order flows through.
    A constant feature differs from its origin by a few units in the last place; sums of those are
    exact, so that it comes out with variance 0 and normalizes to exactly 0. Weighted sums are not;
    there, a second step lands on the constant itself.

    With axis_name, all members get the same origin.
    """
    x, weights = lax.stop_gradient((x, weights))
    ((x,),) = apart((x,), 1)
    if weights is None:
        x = pilot(x, axes)
    count = count_of(x, axes, weights)

    def mean(values: Array) -> Array:
        return share(add_over(weigh(keep(values, weights), weights), batch_axes(x, axes)), count)

    origin = mean(x.astype(statistics_dtype(x.dtype)))
    if weights is not None and weights.dtype != bool:
        origin = origin + mean(center(x, origin, axes))
    return origin if axis_name is None else shared_origin(origin, count, axis_name)


def pilot(x: Array, axes: Axes) -> Array:
    """A part of each example, a sixteenth or more, whose mean is an origin near enough.

    The mean s of one of f equal parts of the values is at most √(f - 1) standard deviations from
    the mean of all (Cauchy-Schwarz: whatever draws s away widens σ too), so E|x - s|² ≤ f σ², and
    of its digits at most log₂ 16 = 4 bits go to the origin. Where examples have no extent, all
    count: to take some of them would move data between the devices that a batch is spread over.
    """
    spec = jax.typeof(x).sharding.spec
    for axis in batch_axes(x, axes)[1:]:
        if x.shape[axis] > 1 and spec[axis] is None:
            return lax.slice_in_dim(x, 0, -(-x.shape[axis] // 16), axis=axis)
    return x


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
    x: Array, origin: Array, axes: Axes, weights: Array | None, axis_name: AxisName | None = None
) -> Sums:
    """The sums from which moments of x - origin are made; over a named axis in one collective."""
    first, second = (keep(center(*copy, axes), weights) for copy in apart((x, origin), 2))
    reduced = batch_axes(x, axes)
    sums = Sums(
        add_over(weigh(first, weights), reduced),
        add_over(weigh(square(second), weights), reduced),
        count_of(x, axes, weights),
    )
    return sums if axis_name is None else lax.psum(sums, axis_name)


def keep(values: Array, weights: Array | None) -> Array:
    """Values, and 0 where they weigh nothing."""
    return values if weights is None else jnp.where(counts(weights), values, jnp.zeros_like(values))


def weigh(kept: Array, weights: Array | None) -> Array:
    """Kept values times their weights."""
    if weights is None or weights.dtype == bool:
        return kept
    return weights.astype(kept.dtype) * kept


def count_of(x: Array, axes: Axes, weights: Array | None) -> Array:
    """Per feature, the number of values or the sum of their weights."""
    real = real_dtype(statistics_dtype(x.dtype))
    if weights is None:
        return jnp.full(feature_shape(x, axes), batch_size(x, axes), real)
    return add_over(weights.astype(real), batch_axes(x, axes))


def add_over(values: Array, axes: Axes) -> Array:
    """Sum over all axes at once, or over the inner ones first where XLA's CPU is careless.

    It adds up several axes one number after the other, which loses digits: always before jaxlib
    0.10, and of small arrays since. The barrier keeps XLA from making one sum of the two.
    """
    careless = values.size < 2**13 or jax.__version_info__ < (0, 10)
    if careless and len(axes) > 1:
        values, axes = lax.optimization_barrier(jnp.sum(values, axes[1:])), axes[:1]
    return jnp.sum(values, axes)


def moments_of(sums: Sums) -> Moments:
    """Moments of data whose mean is near zero: E|d|² - |E d|² then cancels nothing."""
    mean = share(sums.total, sums.count)
    var = share(sums.square, sums.count) - square(mean)
    return Moments(mean, jnp.maximum(var, jnp.zeros_like(var)), sums.count)


def shift(moments: Moments, by: Array) -> Moments:
    """The moments of x + by; where nothing was seen, nothing moves."""
    seen = moments.count > 0
    return moments._replace(mean=lax.select(seen, moments.mean + by, moments.mean))


def counts(weights: Array) -> Array:
    """Which values weigh anything."""
    return weights if weights.dtype == bool else weights > 0


def share(part: Array, whole: Array) -> Array:
    """Part / whole, correctly rounded, and 0 of nothing without a NaN on the way.

    Of one divisor for many values XLA would make a multiplication by its rounded reciprocal, and
    fuse that into the subtractions that use the quotient, each in its own way: two means, a bit
    apart, of one batch. A divisor that is part where part is NaN says the same and is not one.
    """
    safe = lax.select(whole > 0, whole, jnp.ones_like(whole)).astype(part.dtype)
    return part / lax.select(jnp.isnan(part), lax.stop_gradient(part), safe)


def square(x: Array) -> Array:
    """|x|², real."""
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else x * x
