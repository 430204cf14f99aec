"""From data to sums about an origin, of which moments are made.

E[x²] - E[x]² cancels when the mean is large against the spread, and even an exact mean cannot be
stored exactly; but the statistics of x - origin are small numbers, and x - origin itself is exact
for the values near the origin. Sums about one origin are additive, over disjoint sets of values and
over the members of a named axis.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Inexact

from bn_jax.core.axes import Axes, Size, batch_axes, batch_size, for_each_feature, spread
from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.quotient import quotient
from bn_jax.core.together import add_over, add_together


class Sums(NamedTuple):
    """What moments are made of: additive over disjoint sets of values.

    Attributes:
        total: Σ w d, of deviations d from an origin.
        square: Σ w |d|².
        count: Σ w, or None for all there are.
        squares: Σ w² of float weights, or None.
    """

    total: Inexact[Array, "*features"]
    square: Float[Array, "*features"]
    count: Float[Array, "*features"] | None  # pyright: ignore[reportIncompatibleMethodOverride]
    squares: Float[Array, "*features"] | None = None


def center(x: Array, origin: Array, axes: Axes) -> Array:
    """X - origin in the dtype of statistics."""
    return x.astype(origin.dtype) - spread(origin, x, axes)


def without_padding(values: Array, x: Array, weights: Array | None) -> Array:
    """Values, and 0 where x weighs nothing and is not finite: padding may hold anything."""
    return zero_where(is_padding(x, weights), values)


def is_padding(x: Array, weights: Array | None) -> Array | None:
    """Where x weighs nothing and is not finite, or None for nowhere."""
    return None if weights is None else ~(counts(weights) | jnp.isfinite(x))


def zero_where(padding: Array | None, values: Array) -> Array:
    """Values, and 0 for padding."""
    return values if padding is None else jnp.where(padding, jnp.zeros_like(values), values)


def add_up(x: Array, origin: Array, axes: Axes, weights: Array | None) -> Sums:
    """The sums from which moments of x - origin are made."""
    kept = keep(center(x, origin, axes), weights)
    parts = [weigh(kept, weights), weigh(square(kept), weights)]
    if weights is not None:
        parts.append(weights.astype(parts[1].dtype))
    if are_importances(weights):
        parts.append(square(parts[-1]))
    total, squares, *counted = add_together(parts, axes)
    count, weight_squares = (*counted, None, None)[:2]
    return Sums(total, squares, count, weight_squares)


def keep(values: Array, weights: Array | None) -> Array:
    """Values, and 0 where they weigh nothing and could spoil a sum.

    All that a mask excludes. A weight of 0 makes its product 0 by itself, and leaves the value to
    the weight's derivative; unless 0 times the value's square is not 0.
    """
    if weights is None:
        return values
    kept = counts(weights)
    if are_importances(weights):
        kept = kept | jnp.isfinite(square(values))
    return jnp.where(kept, values, jnp.zeros_like(values))


def weigh(kept: Array, weights: Array | None) -> Array:
    """Kept values times their weights."""
    if weights is None or weights.dtype == bool:
        return kept
    return weights.astype(kept.dtype) * kept


def count_of(x: Array, axes: Axes, weights: Array | None) -> Array | Size:
    """The number of values, or per feature the sum of their weights."""
    if weights is None:
        return batch_size(x, axes)
    return add_over(weights.astype(real_dtype(statistics_dtype(x.dtype))), batch_axes(x, axes))


def count_or_all(count: Array | None, x: Array, axes: Axes) -> Array | Size:
    """A count of sums of x, or of all of x where there is none.

    That is known; but in `Sums`, which pass through rules of JAX, it would be traced like the rest.
    """
    return batch_size(x, axes) if count is None else count


def for_each(count: Array | Size, x: Array, axes: Axes) -> Array:
    """A count per feature, also of a number."""
    real = real_dtype(statistics_dtype(x.dtype))
    return for_each_feature(count, x, axes, real) if is_known(count) else count


def is_known(count: Array | Size) -> bool:
    """Whether a count is one number, before anything is computed."""
    return not isinstance(count, Array | np.ndarray | np.generic)


def counts(weights: Array) -> Array:
    """Which values weigh anything."""
    return weights if weights.dtype == bool else weights > 0


def are_importances(weights: Array | None) -> bool:
    """Whether weights are floats: importances, where a mask and integers count values."""
    return weights is not None and jnp.issubdtype(weights.dtype, jnp.floating)


def share(part: Array, whole: Array | Size) -> Array:
    """Part / whole, correctly rounded, and 0 of nothing without a NaN on the way."""
    return quotient(part, divisor(part, whole))


def divisor(part: Array, whole: Array | Size) -> Array:
    """Whole in the dtype of part, and 1 of nothing."""
    if is_known(whole):
        return lax.full_like(part, max(whole, 1))
    return lax.select(whole > 0, whole, jnp.ones_like(whole)).astype(part.dtype)


def square(x: Array) -> Array:
    """|x|², real."""
    return inner(x, x)


def inner(a: Array, b: Array) -> Array:
    """Re a* b."""
    return jnp.real(jnp.conj(a) * b) if jnp.iscomplexobj(a) else a * b
