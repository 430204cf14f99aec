"""The two linear maps between data and numbers per feature, each the transpose of the other.

With d = x - origin - mean, all that batch normalization does with x as a whole is one of these:

    power_sums:  g ↦ Σ g dᵏ         from values of x's shape to numbers per feature
    polynomial:  cₖ ↦ Σₖ cₖ dᵏ      from numbers per feature to values of x's shape

Their derivatives in x are the same two maps again: the tangent of Σ g dᵏ is Σ (k g ẋ) dᵏ⁻¹, and
that of Σₖ cₖ dᵏ is ẋ Σₖ k cₖ dᵏ⁻¹. So the backward pass needs only x, in its own dtype.

Both take x twice. They read and keep `x`, in its own dtype. Gradients flow to `wide`, its float32
copy, so that several gradients are added up in float32 and rounded once.

Numbers per feature have x's rank, with length 1 on the axes to sum over (`layout.py`).
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from bn_jax.core.checks import as_array
from bn_jax.core.xla.primitives import operation
from bn_jax.core.xla.sums import add_together, add_up, local_axes, sums_well

Powers = tuple[int, ...]
Drop = Literal["masked", "broken"]
"""Which values count as 0.

"masked", for forward sums: those that are masked out. With float weights, finite ones stay, because
the derivative in a weight of zero needs them.
"broken", for outputs: only those that are masked out and not finite.
"""


def power_sums(
    powers: Powers,
    x: ArrayLike,
    wide: Array,
    origin: Array,
    *,
    weights: Array | None = None,
    times: Array | None = None,
) -> list[Array]:
    """Σ g dᵏ with d = x - origin, over the values that are not masked out.

    Args:
        powers: the k, each 0, 1 or 2.
        x: real, of any dtype; what is read, and kept for the backward pass.
        wide: x in the dtype of statistics, to which gradients flow.
        origin: per feature, near the mean.
        weights: bool, integer or float, of x's shape; False and 0 mask a value out.
        times: g, of x's shape and origin's dtype; None for 1.

    Returns:
        One sum for each power, of origin's dtype and shape.
    """
    origin = like_sums(x, origin)
    operands = [*readable(x, wide), origin, like_sums(x, jnp.zeros_like(origin))]
    operands += [part for part in (weights, times) if part is not None]
    return bind_sums(*operands, powers=powers, masked=weights is not None, drop="masked")


def polynomial(
    powers: Powers,
    x: ArrayLike,
    wide: Array,
    origin: Array,
    mean: Array,
    coefficients: Sequence[Array],
    *,
    weights: Array | None = None,
) -> Array:
    """Σₖ cₖ dᵏ with d = x - origin - mean; 0 for values that are masked out and not finite.

    Args:
        powers: the k, each 0 or 1, one per coefficient.
        x: as in `power_sums`.
        wide: as in `power_sums`.
        origin: as in `power_sums`.
        mean: of x - origin, per feature.
        coefficients: the cₖ, each of origin's dtype and shape.
        weights: as in `power_sums`.

    Returns:
        Values of x's shape, in origin's dtype.
    """
    origin, mean, *coefficients = (like_sums(x, part) for part in (origin, mean, *coefficients))
    operands = [*readable(x, wide), origin, mean, *([] if weights is None else [weights])]
    options = {"powers": powers, "masked": weights is not None, "timed": False, "drop": "broken"}
    return bind_polynomial(*operands, *coefficients, **options)[0]


def part_mean(x: ArrayLike, like: Array) -> Array:
    """The mean of a part of x that no device has to fetch from another; a constant.

    Args:
        x: real or complex.
        like: an array of the shape and dtype of the result.
    """
    like = like_sums(x, jnp.zeros_like(like))
    return bind_part_mean(lax.stop_gradient(as_array(x)), like)[0]


def readable(x: ArrayLike, wide: Array) -> tuple[Array, Array]:
    """Return x and wide; without primitives, twice wide, which JAX differentiates then."""
    return (wide, wide) if bind_sums is plain_sums else (as_array(x), wide)


def summed(number: Array) -> tuple[int, ...]:
    """The axes to sum over: those of length 1 (if x has length 1 too, its sum is x itself)."""
    return tuple(axis for axis, size in enumerate(number.shape) if size == 1)


def like_sums(x: ArrayLike, number: Array) -> Array:
    """A number per feature with the type of a sum over x, on a mesh or within shard_map."""
    wanted = type_of_sum(jax.typeof(x), number)
    if jax.typeof(number) == wanted:
        return number
    zero = lax.full(number.shape, 0, number.dtype, sharding=wanted.sharding)
    return number + (zero + jnp.zeros_like(x, number.dtype, shape=(1,) * np.ndim(x)))


def type_of_sum(x: Any, like: Any) -> Any:
    """The type of a sum over x: sharded as x is, and varying over the same devices."""
    names = zip(like.shape, x.sharding.spec, strict=True)
    sharding = x.sharding.update(spec=[None if size == 1 else name for size, name in names])
    return x.update(shape=like.shape, dtype=like.dtype, sharding=sharding, weak_type=False)


# The values. Operands are x, wide, origin, mean, weights if masked, then g if any, then the cₖ.


def center(
    x: Array, origin: Array, weights: Array | None, drop: Drop, mean: Array | None = None
) -> tuple[Array, Array | None]:
    """The values x - origin - mean, 0 where dropped; and which are kept (None for all)."""
    if weights is None:
        d = x.astype(origin.dtype) - origin
        return d if mean is None else d - mean, None
    keep = counted = weights if weights.dtype == bool else weights > 0
    importances = jnp.issubdtype(weights.dtype, jnp.floating)
    if drop == "broken" or importances:
        keep = counted | jnp.isfinite(x)
    x = zero_unless(keep, x)  # before anything is computed from it, for debug_nans
    d = x.astype(origin.dtype) - origin
    d = d if mean is None else d - mean
    if drop == "masked" and importances:
        # A weight of 0 makes its product 0 anyway, unless d² is not finite. The value stays in
        # place, so that the derivative in the weight is right.
        keep = counted | (keep & jnp.isfinite(d * d))
    return zero_unless(keep, d), keep


def terms_of_sums(*operands, powers, masked, drop):
    """The arrays g dᵏ that are to be summed."""
    x, _, origin, mean, weights, times = unpack(operands, masked)
    d, keep = center(x, origin, weights, drop, mean)
    factor = times[0] if times else None
    if keep is not None:
        factor = keep.astype(d.dtype) if factor is None else zero_unless(keep, factor)
    return [product(factor, d, k) for k in powers]


def plain_sums(*operands, **options):
    """Σ g dᵏ for each power."""
    axes = summed(operands[2])
    return [jnp.sum(term, axes, keepdims=True) for term in terms_of_sums(*operands, **options)]


def cpu_sums(*operands, alone, **options):
    """Σ g dᵏ for each power, in one pass over memory."""
    return add_together(terms_of_sums(*operands, **options), summed(operands[2]), alone)


def plain_polynomial(*operands, powers, masked, timed, drop):
    """The values g Σₖ cₖ dᵏ, where g is 1 unless it is given."""
    x, _, origin, mean, weights, rest = unpack(operands, masked)
    d, keep = center(x, origin, weights, drop, mean)
    terms = [product(c, d, k) for c, k in zip(rest[timed:], powers, strict=True)]
    y = functools.reduce(jnp.add, terms)
    y = rest[0] * y if timed else y
    y = y if y.shape == d.shape else y + jnp.zeros_like(d)  # which also shards it as x is
    return [y if keep is None else zero_unless(keep, y)]


def mean_of_all(x, like):
    """The mean of each feature."""
    return [jnp.mean(x.astype(like.dtype), summed(like), keepdims=True)]


def mean_of_part(x, like, *, alone):
    """The mean of the first sixteenth of each feature's values, but of at least 128.

    The mean of 128 values is mostly within a tenth of a standard deviation. The part is cut from
    one axis that lies on one device. Small arrays and arrays of symbolic size are averaged whole.
    """
    axes = summed(like)
    size = functools.reduce(lambda count, axis: count * x.shape[axis], axes, 1)
    parts = min(16, size // 128) if isinstance(size, int) else 1
    if len(axes) > 1:  # then small sums take more kernels
        parts = max((n for n in range(1, parts + 1) if sums_well(x, axes, n)), default=1)
    cut = (axis for axis in local_axes(x, axes, alone) if parts > 1 and x.shape[axis] > 1)
    if (axis := next(cut, None)) is not None:
        rows = -(-x.shape[axis] // parts)
        size = size // x.shape[axis] * rows
        x = lax.slice_in_dim(x, 0, rows, axis=axis)
    share = 1 / max(size, 1) if isinstance(size, int) else 1 / jnp.asarray(size, like.dtype)
    return [add_up(x.astype(like.dtype) * share, axes)]


def unpack(operands, masked):
    """x, wide, origin, mean, weights or None, and the list of the others."""
    fixed, rest = list(operands[:4]), list(operands[4:])
    return (*fixed, rest.pop(0) if masked else None, rest)


def product(factor: Array | None, d: Array, power: int) -> Array:
    """Factor · dᵏ; the factor may be None for 1."""
    if power == 0:
        return jnp.ones_like(d) if factor is None else factor
    power_of_d = d if power == 1 else d * d
    return power_of_d if factor is None else factor * power_of_d


def zero_unless(keep: Array, values: Array) -> Array:
    """Values, and 0 where they are not kept."""
    return lax.select(keep, values, jnp.zeros_like(values))


# The derivatives. A tangent or cotangent is None where it is zero.


def sums_jvp(operands, tangents, **options):
    """The tangent of Σ g dᵏ is Σ ġ dᵏ + k Σ g ḋ dᵏ⁻¹, where ḋ = ẋ - origin˙ - mean˙."""
    _, x_dot, *center_dots, _, g_dot = unpack(tangents, options["masked"])
    mean_dot = add(center_dots)
    *_, g = unpack(operands, options["masked"])
    powers, lower = options["powers"], tuple(k - 1 for k in options["powers"] if k)

    def again(times, powers):
        return repeat(bind_sums, operands, options | {"powers": powers}, times)

    dots = {k: [] for k in powers}
    if g and g_dot[0] is not None:
        for k, total in zip(powers, again(g_dot, powers), strict=True):
            dots[k].append(total)
    if lower and x_dot is not None:
        x_dot = x_dot.astype(operands[2].dtype)
        for k, total in zip(lower, again([g[0] * x_dot if g else x_dot], lower), strict=True):
            dots[k + 1].append((k + 1) * total)
    if lower and mean_dot is not None:
        for k, total in zip(lower, again(g, lower), strict=True):
            dots[k + 1].append(-(k + 1) * mean_dot * total)
    return bind_sums(*operands, **options), [add(dots[k]) for k in powers]


def polynomial_jvp(operands, tangents, **options):
    """The tangent of g Σₖ cₖ dᵏ is ġ Σₖ cₖ dᵏ + g Σₖ ċₖ dᵏ + g ḋ Σₖ k cₖ dᵏ⁻¹."""
    _, x_dot, *center_dots, _, rest_dots = unpack(tangents, options["masked"])
    *_, rest = unpack(operands, options["masked"])
    mean_dot, timed, powers = add(center_dots), options["timed"], options["powers"]
    times, coefficients = rest[:timed], rest[timed:]

    def again(by_power, *times):
        changed = {"powers": tuple(by_power), "timed": bool(times)}
        factors = [*times, *by_power.values()]
        return repeat(bind_polynomial, operands, options | changed, factors)[0]

    slope = {k - 1: k * c for k, c in zip(powers, coefficients, strict=True) if k}
    moves = dict(zip(powers, rest_dots[timed:], strict=True))
    for k, c in slope.items() if mean_dot is not None else ():
        moves[k] = add([moves.get(k), -c * mean_dot])
    moves = {k: dot for k, dot in moves.items() if dot is not None}
    dots = [again(moves, *times)] if moves else []
    if timed and rest_dots[0] is not None:
        dots.append(again(dict(zip(powers, coefficients, strict=True)), rest_dots[0]))
    if slope and x_dot is not None:
        x_dot = x_dot.astype(operands[2].dtype)
        if slope.keys() == {0} and not times and not options["masked"]:  # no pass over x is needed
            dots.append(slope[0] * x_dot)
        else:
            dots.append(again(slope, times[0] * x_dot if times else x_dot))
    return bind_polynomial(*operands, **options), [add(dots)]


def sums_transpose(cotangents, operands, **options):
    """For g, the polynomial whose coefficients are the cotangents."""
    asked = {k: c for k, c in zip(options["powers"], cotangents, strict=True) if c is not None}
    options |= {"powers": tuple(asked), "timed": False}
    return repeat(bind_polynomial, operands, options, asked.values())


def polynomial_transpose(cotangents, operands, **options):
    """For the coefficients, power sums of the cotangent; for g, the same map with it as g."""
    timed = options.pop("timed")
    *_, rest = unpack(operands, options["masked"])
    times, coefficients = rest[:timed], rest[timed:]
    if timed and times[0] is None:
        changed = options | {"timed": True}
        return repeat(bind_polynomial, operands, changed, [*cotangents, *coefficients])
    asked = zip(options["powers"], coefficients, strict=True)
    options["powers"] = tuple(k for k, c in asked if c is None)
    return repeat(bind_sums, operands, options, [times[0] * cotangents[0]] if timed else cotangents)


def repeat(bind, operands, options, factors):
    """One of the two maps at the same x, with other factors and options.

    Here x stands in for `wide`, which the backward pass does not keep. So second derivatives flow
    to x itself.
    """
    x, _, *fixed = operands[: 5 if options["masked"] else 4]
    return bind(x, x, *fixed, *factors, **options)


def add(dots: Sequence[Any]) -> Any:
    """The sum of tangents, where None is zero."""
    return functools.reduce(lambda a, b: b if a is None else a if b is None else a + b, dots, None)


bind_sums = operation(
    "power_sums",
    plain_sums,
    lambda x, wide, origin, *_, powers, **__: [type_of_sum(x, origin)] * len(powers),
    on={"cpu": cpu_sums},
    jvp=sums_jvp,
    transpose=sums_transpose,
)
bind_polynomial = operation(
    "polynomial",
    plain_polynomial,
    lambda x, wide, origin, *_, **__: [x.update(dtype=origin.dtype, weak_type=False)],
    jvp=polynomial_jvp,
    transpose=polynomial_transpose,
)
bind_part_mean = operation(
    "part_mean", mean_of_all, lambda x, like: [type_of_sum(x, like)], on={"all": mean_of_part}
)
