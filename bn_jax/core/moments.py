"""What does this batch look like? Mean, variance, and of how many values.

Three instances: the statistics of a mini-batch (Algorithm 1 of Ioffe & Szegedy 2015, lines 1-2),
those of a batch spread over eight devices, those of a whole data set seen batch by batch. They
are one thing, because moments form a commutative monoid: `merge` joins two disjoint sets of
values, and moments with count 0 are its identity.

Everything here is computed about an *origin* near the mean. E[x²] - E[x]² cancels when the mean is
large against the spread, and even an exact mean cannot be stored exactly; but the statistics of
x - origin are small numbers, and x - origin itself is exact for the values near the origin.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Inexact, Shaped

from bn_jax.core.axes import Axes, Size, collapse, feature_axes, feature_shape, spread_where
from bn_jax.core.exported import exported
from bn_jax.core.origin import origin_of, shared_origin
from bn_jax.core.replicas import AxisIndexGroups, AxisName, read_replicas, sum_over
from bn_jax.core.sums import Sums, add_up, count_or_all, divisor, for_each, inner, share, square


@exported
class Moments(NamedTuple):
    """Mean, biased variance and count, one of each per feature.

    Attributes:
        mean: E[x], at least float32 (complex for complex data).
        var: E[|x - E[x]|²], biased (1/m) as in Algorithm 1; real, never negative.
        count: m, the number of values or the sum of their weights; 0 means "nothing seen", and
            then mean and var are 0.
        squares: Σ w² of values measured with float weights, from which follows how many values
            there are in effect, (Σw)²/Σw² (Kish 1965); None where each value counts as one.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Float[Array, "*features"]  # pyright: ignore[reportIncompatibleMethodOverride]
    squares: Float[Array, "*features"] | None = None


def measure(
    x: Shaped[Array | np.ndarray, "..."],
    *,
    feature_axis: SupportsIndex | Sequence[SupportsIndex] = -1,
    where: Shaped[Array | np.ndarray, "..."] | Sequence[Any] | None = None,
) -> Moments:
    """The moments of each feature of one array.

    μ = (1/m) Σ wᵢ xᵢ,  σ² = (1/m) Σ wᵢ |xᵢ - μ|²,  m = Σ wᵢ  (Algorithm 1, lines 1-2, with w = 1).

    Args:
        x: float or complex, any shape.
        feature_axis: the axes that are kept, negatives allowed.
        where: which values count: a bool mask, integers (k counts as k copies of the value) or
            non-negative float weights (importances), of x's shape, of x's shape without its
            feature axes, or broadcastable to either. What is excluded may hold anything, NaN
            included.

    Returns:
        Moments of the features' shape, in at least float32.

    Raises:
        TypeError: x is not inexact, or where is neither bool, integer nor float.
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
    moments = shift(origin, moments_of(add_up(x, origin, axes, weights), x, axes))
    return jax.tree.map(lambda part: part.reshape(features), moments)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two disjoint sets of values taken together (Chan, Golub & LeVeque 1979).

    With n = nₐ + n_b, the shares p = nₐ/n and q = n_b/n, and δ = μ_b - μₐ:
    μ = pμₐ + qμ_b,  σ² = pσₐ² + qσ_b² + pq|δ|².

    Associative and commutative up to rounding; moments with count 0 are the identity. Importances
    must be on one scale in both sets, since counts are what the sets weigh.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(12.0).reshape(6, 2)
    >>> halves = merge(measure(x[:2]), measure(x[2:]))
    >>> bool(jnp.allclose(halves.mean, measure(x).mean)), halves.count.tolist()
    (True, [6.0, 6.0])
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
    squares = None
    if a.squares is not None or b.squares is not None:
        square_a, square_b = (m.count if m.squares is None else m.squares for m in (a, b))
        squares = square_a + square_b
    return Moments(mean, var, count, squares)


def pool(
    moments: Moments, axis_name: AxisName, *, axis_index_groups: AxisIndexGroups | None = None
) -> Moments:
    """The moments over all members of a named axis (or several) of vmap, shard_map or pmap.

    Each member's count weighs its share, so members may be uneven or empty. All members get the
    same result, which shard_map may return as replicated; of groups, all of one group. Two
    collectives: one agrees on an origin, one sums.

    Args:
        moments: of this member.
        axis_name: the name or names to pool over.
        axis_index_groups: pool within groups of that axis, a partition of its indices.

    Raises:
        NameError: axis_name is not bound here.
        ValueError: the groups do not hold each index of the axis once.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.arange(12.0).reshape(3, 2, 2)
    >>> pooled = jax.vmap(lambda x: pool(measure(x), "shards"), axis_name="shards")(x)
    >>> pooled.mean.tolist() == [measure(x).mean.tolist()] * 3
    True
    """
    replicas = read_replicas(axis_name, axis_index_groups)
    return pool_by(moments, lambda parts: sum_over(parts, replicas))


# The pieces from which `measure`, `pool` and `batch_norm` are put together.


def pool_by(moments: Moments, add: Callable[[Any], Any]) -> Moments:
    """The moments of many sets of values, by a function that adds arrays up over all sets."""
    here = moments._replace(mean=jnp.zeros_like(moments.mean))
    return shift(*pool_about(moments.mean, here, add))


def pool_about(origin: Array, near: Moments, add: Callable[[Any], Any]) -> tuple[Array, Moments]:
    """The same, of moments of x - origin; returned are one origin for all, and moments about it.

    No mean is stored on the way at its own size, where its rounding is σ·10⁻³ at a mean of 10⁴ σ.
    """
    everywhere = shared_origin(origin, near.count, add)
    mean, var, count = near.mean + (origin - everywhere), near.var, near.count
    total, squares = count.astype(mean.dtype) * mean, count * (var + square(mean))
    sums = add(Sums(total, squares, count, near.squares))
    return everywhere, Moments(*mean_and_var(sums, sums.count), sums.count, sums.squares)


def moments_of(sums: Sums, x: Array, axes: Axes) -> Moments:
    """The moments of x, or of x and what was added to its sums."""
    count = count_or_all(sums.count, x, axes)
    return Moments(*mean_and_var(sums, count), for_each(count, x, axes), sums.squares)


def mean_and_var(sums: Sums, count: Array | Size) -> tuple[Array, Array]:
    """E d and E|d|² - |E d|², of data whose mean is near zero: so it cancels nothing."""
    mean = share(sums.total, count)
    var = share(sums.square, count) - square(mean)
    # Not by maximum, which at 0, of a constant feature, would pass on half of a derivative: the
    # first of `measure`, the second of `batch_norm`.
    return mean, lax.select(var < 0, jnp.zeros_like(var), var)


def push_mean_and_var(
    mean: Array, var: Array, count: Array | Size, sums_dot: Sums
) -> tuple[Array, Array]:
    """Their tangents, from those of the sums; that of the count may be None for zero.

    Also where rounding made a variance negative, and zero was taken instead.
    """
    mean_dot, var_dot, count_dot, _ = sums_dot
    if count_dot is not None:
        mean_dot = mean_dot - mean * count_dot.astype(mean.dtype)
        var_dot = var_dot - (var + square(mean)) * count_dot
    mean_dot = mean_dot / divisor(mean_dot, count)
    return mean_dot, var_dot / divisor(var_dot, count) - 2 * inner(mean, mean_dot)


def degrees_of_freedom(count: Any, squares: Array | None) -> Array:
    """How much is left of a count to estimate a variance by, when the mean is known from it too.

    m - 1 of m values. Of importances, Σw - Σw²/Σw, which is Σw (n - 1)/n with the effective count
    n = (Σw)²/Σw²: divided by it, Σ w|x - μ|² has no bias where all values have one variance, on any
    scale of the weights (numpy.cov corrects its aweights alike). 0 where less than 10⁻⁴ of Σw is
    left, because one value outweighs all others: against that little, rounding (10⁻⁷ of Σw or
    more) would show.
    """
    if squares is None:
        return count - 1
    left = count - share(squares, count)
    return lax.select(left > 1e-4 * count, left, jnp.zeros_like(left))


def shift(by: Array, moments: Moments) -> Moments:
    """The moments of x + by."""
    return moments._replace(mean=moments.mean + by)
