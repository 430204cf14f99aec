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

from bn_jax.core.centered import add
from bn_jax.core.checks import as_array, check_alike
from bn_jax.core.exported import exported
from bn_jax.core.layout import read_layout
from bn_jax.core.replicas import AxisIndexGroups, AxisName, read_replicas, sum_over
from bn_jax.core.sums import (
    Sums,
    divisor,
    inner,
    origin_of,
    share,
    shared_origin,
    square,
    sums_about,
)
from bn_jax.core.xla.primitives import operation


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
        rest: what rounding the mean lost: mean + rest is the mean in double the precision. None
            where it is not known.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Float[Array, "*features"]  # pyright: ignore[reportIncompatibleMethodOverride]
    squares: Float[Array, "*features"] | None = None
    rest: Inexact[Array, "*features"] | None = None


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
    x = as_array(x)
    layout = read_layout(x, feature_axis)
    weights = layout.full_weights(where, x)
    like = layout.bring_in(None, x)
    origin = origin_of(x, weights, like)
    sums = sums_about(origin, x, x.astype(like.dtype), weights)
    return jax.tree.map(layout.take_out, moments_of_x(origin, sums))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two disjoint sets of values taken together (Chan, Golub & LeVeque 1979).

    With n = nₐ + n_b, the shares p = nₐ/n and q = n_b/n, and δ = μ_b - μₐ:
    μ = pμₐ + qμ_b,  σ² = pσₐ² + qσ_b² + pq|δ|².

    Associative and commutative up to rounding; moments with count 0 are the identity. Importances
    must be on one scale in both sets, since counts are what the sets weigh.

    Raises:
        ValueError: a and b have features of different shapes.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(12.0).reshape(6, 2)
    >>> halves = merge(measure(x[:2]), measure(x[2:]))
    >>> bool(jnp.allclose(halves.mean, measure(x).mean)), halves.count.tolist()
    (True, [6.0, 6.0])
    """
    check_alike(a.mean, b.mean)
    count = a.count + b.count
    share_a, share_b = share(a.count, count), share(b.count, count)
    difference = (b.mean - a.mean) + (rest_of(b) - rest_of(a))
    # Step from the larger set: when it is all there is, the step is exactly zero.
    from_a = share_b <= share_a
    start, rest = lax.select(from_a, a.mean, b.mean), lax.select(from_a, rest_of(a), rest_of(b))
    step = lax.select(from_a, share_b, -share_a).astype(difference.dtype) * difference
    mean, rest = exact_sum(start, rest + step)
    var = share_a * a.var + share_b * b.var + share_a * share_b * square(difference)
    squares = None
    if a.squares is not None or b.squares is not None:
        square_a, square_b = (m.count if m.squares is None else m.squares for m in (a, b))
        squares = square_a + square_b
    return Moments(mean, var, count, squares, rest)


def pool(
    moments: Moments, axis_name: AxisName, *, axis_index_groups: AxisIndexGroups | None = None
) -> Moments:
    """The moments over all members of a named axis (or several) of vmap, shard_map or pmap.

    Each member's count weighs its share, so members may be uneven or empty. All members get the
    same result, which shard_map may return as replicated. With groups, members of one group get the
    same result. Two collectives: one agrees on an origin, one sums.

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
    return pool_with(moments, lambda parts: sum_over(parts, replicas))


# The pieces from which `measure`, `pool` and `standardize` are put together.


def pool_with(moments: Moments, add_sets: Callable[[Any], Any]) -> Moments:
    """Pool the moments of many sets of values, given a function that adds arrays over all sets."""
    near = moments._replace(mean=rest_of(moments))
    return add_origin(*pool_centered(moments.mean, near, add_sets))


def pool_centered(
    origin: Array, near: Moments, add_sets: Callable[[Any], Any]
) -> tuple[Array, Moments]:
    """Pool moments of x - origin. Returns a common origin, and the moments of x minus that.

    Adding the origin back here would round the mean: by 10⁻³ σ at a mean of 10⁴ σ.
    """
    everywhere = shared_origin(origin, near.count, add_sets)
    mean, var, count = near.mean + (origin - everywhere), near.var, near.count
    total, squared = count.astype(mean.dtype) * mean, count * (var + square(mean))
    return everywhere, centered_moments(add_sets(Sums(total, squared, count, near.squares)))


def moments_of_x(origin: Array, sums: Sums) -> Moments:
    """The moments of x, from the sums of x - origin."""
    return add_origin(origin, centered_moments(sums))


def add_origin(origin: Array, near: Moments) -> Moments:
    """The moments of x, from those of x - origin."""
    mean, rest = exact_sum(origin, near.mean)
    return near._replace(mean=mean, rest=rest)


def centered_moments(sums: Sums) -> Moments:
    """The moments of what was summed, about its origin."""
    mean, var = mean_and_var(sums)
    return Moments(mean, var, sums.count, sums.squares)


def mean_and_var(sums: Sums) -> tuple[Array, Array]:
    """The moments E d and E|d|² - |E d|² of data whose mean is near zero, so nothing cancels."""
    mean, var = bind_mean_and_var(*sums[:3])
    return mean, var


def plain_mean_and_var(total, squared, count):
    """S₁/m and (S₂ - S₁* S₁/m)/m. Only the first needs the exact division."""
    mean = share(total, count)
    var = (squared - inner(total, mean)) / divisor(squared, count)
    return [mean, lax.select(var < 0, jnp.zeros_like(var), var)]


def mean_and_var_jvp(operands, tangents):
    """μ˙ = (Ṡ₁ - μ ṁ)/m and (σ²)˙ = (Ṡ₂ - (σ² + |μ|²) ṁ)/m - 2 Re μ* μ˙.

    Where rounding made a variance negative and it was set to 0, the derivative is still this one.
    """
    mean, var = bind_mean_and_var(*operands)
    total_dot, squared_dot, count_dot = tangents
    if count_dot is not None:
        total_dot = add([total_dot, -(mean * count_dot.astype(mean.dtype))])
        squared_dot = add([squared_dot, -((var + square(mean)) * count_dot)])
    mean_dot = None if total_dot is None else total_dot / divisor(total_dot, operands[2])
    var_dot = None if squared_dot is None else squared_dot / divisor(squared_dot, operands[2])
    if mean_dot is not None:
        var_dot = add([var_dot, -2 * inner(mean, mean_dot)])
    return [mean, var], [mean_dot, var_dot]


bind_mean_and_var = operation(
    "mean_and_var",
    plain_mean_and_var,
    lambda total, squared, _: [total, squared],
    jvp=mean_and_var_jvp,
)


def exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum of a and b, and what rounding lost (Knuth's two-sum; a constant)."""
    total = a + b
    a, b, rounded = lax.stop_gradient((a, b, total))
    part = rounded - a
    return total, (a - (rounded - part)) + (b - part)


def rest_of(moments: Moments) -> Array:
    """What rounding the mean lost; 0 where it is not known."""
    return jnp.zeros_like(moments.mean) if moments.rest is None else moments.rest


def degrees_of_freedom(count: Any, squares: Array | None) -> Array:
    """How much is left of a count to estimate a variance by, when the mean is known from it too.

    m - 1 of m values. Of importances, Σw - Σw²/Σw, which is Σw (n - 1)/n with the effective count
    n = (Σw)²/Σw²: divided by it, Σ w|x - μ|² has no bias where all values have one variance, on any
    scale of the weights (numpy.cov corrects its aweights alike). 0 where less than 10⁻⁴ of Σw is
    left, because one value outweighs all others: below that, it would be mostly rounding error.
    """
    if squares is None:
        return count - 1
    left = count - share(squares, count)
    return lax.select(left > 1e-4 * count, left, jnp.zeros_like(left))
