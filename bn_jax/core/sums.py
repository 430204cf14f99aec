"""From data to sums about an origin, of which moments are made.

E[x²] - E[x]² cancels when the mean is large against the spread, and even an exact mean cannot be
stored exactly; but the statistics of x - origin are small numbers, and x - origin itself is exact
for the values near the origin. Sums about one origin are additive, over disjoint sets of values and
over the members of a named axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Inexact

from bn_jax.core.apart import apart
from bn_jax.core.axes import Axes, batch_axes, batch_size, feature_shape, feature_spec, spread
from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.replicas import Replicas, sum_over


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


def origin_of(
    x: Array, axes: Axes, weights: Array | None, replicas: Replicas | None = None
) -> Array:
    """A point per feature near the mean: that of a pilot, or of all values where they are weighed.

    A constant: moments do not depend on the origin, so no derivative of any order flows through.
    A constant feature differs from its origin by a few units in the last place; sums of those are
    exact, so that it comes out with variance 0 and normalizes to exactly 0. Weighted sums are not;
    there, a second step lands on the constant itself.

    With replicas, all that share statistics get the same origin.
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
    if replicas is None:
        return origin
    return shared_origin(origin, count, lambda parts: sum_over(parts, replicas))


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


def shared_origin(origin: Array, count: Array, add: Callable[[Any], Any]) -> Array:
    """The mean of all sets' origins, each weighed by its count: near the mean of all values."""
    origin, count = lax.stop_gradient((origin, count))
    return share(*add((count.astype(origin.dtype) * origin, count)))


def center(x: Array, origin: Array, axes: Axes) -> Array:
    """X - origin in the dtype of statistics."""
    return x.astype(origin.dtype) - spread(origin, x, axes)


def without_padding(values: Array, x: Array, weights: Array | None) -> Array:
    """Values, and 0 where x weighs nothing and is not finite: padding may hold anything."""
    if weights is None:
        return values
    harmless = counts(weights) | jnp.isfinite(x)
    return jnp.where(harmless, values, jnp.zeros_like(values))


def add_up(x: Array, origin: Array, axes: Axes, weights: Array | None) -> Sums:
    """The sums from which moments of x - origin are made."""
    first, second = (keep(center(*copy, axes), weights) for copy in apart((x, origin), 2))
    reduced = batch_axes(x, axes)
    return Sums(
        add_over(weigh(first, weights), reduced),
        add_over(weigh(square(second), weights), reduced),
        count_of(x, axes, weights),
    )


def keep(values: Array, weights: Array | None) -> Array:
    """Values, and 0 where they weigh nothing and could spoil a sum.

    All that a mask excludes. A weight of 0 makes its product 0 by itself, and leaves the value to
    the weight's derivative; unless 0 times the value's square is not 0.
    """
    if weights is None:
        return values
    kept = weights if weights.dtype == bool else (weights > 0) | jnp.isfinite(square(values))
    return jnp.where(kept, values, jnp.zeros_like(values))


def weigh(kept: Array, weights: Array | None) -> Array:
    """Kept values times their weights."""
    if weights is None or weights.dtype == bool:
        return kept
    return weights.astype(kept.dtype) * kept


def count_of(x: Array, axes: Axes, weights: Array | None) -> Array:
    """Per feature, the number of values or the sum of their weights."""
    real = real_dtype(statistics_dtype(x.dtype))
    if weights is None:
        sharding = jax.typeof(x).sharding.update(spec=feature_spec(x, axes))
        return lax.full(feature_shape(x, axes), batch_size(x, axes), real, sharding=sharding)
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
