"""From data to sums about an origin, from which moments are made.

E[x²] - E[x]² cancels where the mean is large against the spread, and even an exact mean cannot be
stored exactly. But x - origin is exact for values near the origin, and its statistics are small
numbers. Its sums are additive: over disjoint sets of values, and over the members of a named axis.

Numbers per feature have x's rank here (`layout.py`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Inexact

from bn_jax.core.centered import part_mean, power_sums, summed
from bn_jax.core.replicas import Replicas, sum_over
from bn_jax.core.xla.barriers import same_everywhere
from bn_jax.core.xla.division import divide


class Sums(NamedTuple):
    """What moments are made from; additive over disjoint sets of values.

    Attributes:
        total: Σ w d, of the deviations d from an origin.
        square: Σ w |d|².
        count: Σ w.
        squares: Σ w² of float weights, or None.
    """

    total: Inexact[Array, "..."]
    square: Float[Array, "..."]
    count: Float[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    squares: Float[Array, "..."] | None = None


def sums_about(origin: Array, x: Array, wide: Array, weights: Array | None) -> Sums:
    """The sums of x - origin, of origin's shape.

    Args:
        origin: a constant near the mean, per feature.
        x: what is kept for the backward pass.
        wide: x in the dtype of statistics, to which derivatives flow.
        weights: of x's shape, or None where each value counts once.
    """
    if jnp.iscomplexobj(origin):
        real, imaginary = (
            sums_about(part(origin), part(x), part(wide), weights) for part in (jnp.real, jnp.imag)
        )
        total = lax.complex(real.total, imaginary.total)
        return real._replace(total=total, square=real.square + imaginary.square)
    if weights is None:
        total, square = power_sums((1, 2), x, wide, origin)
        return Sums(total, square, jnp.full_like(total, values_per_feature(x, origin)))
    times = None if weights.dtype == bool else weights.astype(origin.dtype)
    sums = power_sums((0, 1, 2), x, wide, origin, weights=weights, times=times)
    squares = [None]
    if times is not None and are_importances(weights):
        once, times = lax.stop_gradient((x, times))
        squares = power_sums((0,), once, once, origin, weights=weights, times=times * times)
    count, total, square = sums
    return Sums(total, square, count, *squares)


def origin_of(
    x: Array, weights: Array | None, like: Array, replicas: Replicas | None = None
) -> Array:
    """A point near the mean, about which sums lose no digits; with replicas, the same for all.

    It is the mean of a part of x, or of all of x if that is weighted. The mean of one of f equal
    parts is at most √(f - 1) standard deviations from the mean of all, whatever the data
    (Cauchy-Schwarz: an outlier that draws it away also widens σ). So E|x - origin|² ≤ f σ², and at
    most log₂ 16 = 4 bits are lost.

    A constant feature differs from its origin by a few units in the last place. Plain sums of those
    are exact, so its variance is 0 and it normalizes to exactly 0. Weighted sums are not exact, so
    a second step lands on the constant itself.

    The origin is a constant: moments do not depend on it, so no derivative flows through it.
    """
    x, weights = lax.stop_gradient((x, weights))
    if weights is None:
        origin = part_mean(x, like)
        count = jnp.full_like(origin.real, values_per_feature(x, like))
    else:
        origin, count = jnp.zeros_like(like), jnp.zeros_like(like.real)
        for _ in range(1 if weights.dtype == bool else 2):
            sums = sums_about(origin, x, x.astype(like.dtype), weights)
            origin, count = origin + share(sums.total, sums.count), sums.count
    if replicas is not None:
        origin = shared_origin(origin, count, lambda parts: sum_over(parts, replicas))
    return same_everywhere(origin)


def shared_origin(origin: Array, count: Array, add: Callable[[Any], Any]) -> Array:
    """The average of the origins of several sets of values, weighted by their counts."""
    origin, count = lax.stop_gradient((origin, count))
    return share(*add((count.astype(origin.dtype) * origin, count)))


def values_per_feature(x: ArrayLike, like: Array) -> Any:
    """How many values of x there are for each number of like."""
    return math.prod(jnp.shape(x)[axis] for axis in summed(like))


def are_importances(weights: Array | None) -> bool:
    """Whether weights are floats: importances, where a mask and integers count values."""
    return weights is not None and jnp.issubdtype(weights.dtype, jnp.floating)


def share(part: Array, whole: Array) -> Array:
    """Part / whole, rounded once; 0 of nothing, without a NaN on the way."""
    return divide(part, divisor(part, whole))


def divisor(part: Array, whole: Array) -> Array:
    """Whole in the dtype of part, and 1 for nothing."""
    return lax.select(whole > 0, whole, jnp.ones_like(whole)).astype(part.dtype)


def square(x: Array) -> Array:
    """|x|², real."""
    return inner(x, x)


def inner(a: Array, b: Array) -> Array:
    """Re a* b."""
    return jnp.real(jnp.conj(a) * b) if jnp.iscomplexobj(a) else a * b
