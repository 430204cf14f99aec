"""A point near the mean, about which sums lose nothing.

From the mean of a part of the data: the mean s of one of f equal parts is at most √(f - 1) standard
deviations from the mean of all (Cauchy-Schwarz: whatever draws s away widens σ too), so
E|x - s|² ≤ f σ², and of its digits at most log₂ 16 = 4 bits go to the origin.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from bn_jax.core.axes import Axes, batch_axes, batch_size
from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.replicas import Replicas, sum_over
from bn_jax.core.stored import computed_once
from bn_jax.core.sums import center, count_of, for_each, keep, share, weigh
from bn_jax.core.together import add_over, batched, inner_axes, local_axes, per_feature


def origin_of(
    x: Array, axes: Axes, weights: Array | None, replicas: Replicas | None = None
) -> Array:
    """The mean of a part of x per feature, or of all of it where it is weighed.

    A constant: moments do not depend on the origin, so no derivative of any order flows through.
    A constant feature differs from its origin by a few units in the last place; sums of those are
    exact, so that it comes out with variance 0 and normalizes to exactly 0. Weighted sums are not;
    there, a second step lands on the constant itself.

    With replicas, all that share statistics get the same origin.
    """
    x, weights = lax.stop_gradient((x, weights))
    count = count_of(x, axes, weights)

    def mean(values: Array) -> Array:
        return share(add_over(weigh(keep(values, weights), weights), batch_axes(x, axes)), count)

    if weights is None:
        origin = part_p.bind(x, axes=axes)
    else:
        origin = mean(x.astype(statistics_dtype(x.dtype)))
        if weights.dtype != bool:
            origin = origin + mean(center(x, origin, axes))
    if replicas is None:
        return computed_once(origin)
    return shared_origin(origin, for_each(count, x, axes), lambda parts: sum_over(parts, replicas))


def shared_origin(origin: Array, count: Array, add: Callable[[Any], Any]) -> Array:
    """The mean of all sets' origins, each weighed by its count: near the mean of all values."""
    origin, count = lax.stop_gradient((origin, count))
    return computed_once(share(*add((count.astype(origin.dtype) * origin, count))))


def mean_of_part(x: Array, *, axes: Axes, within: Sequence[int]) -> Array:
    """Per feature the mean of a part of x.

    A sixteenth along the first of some axes that has an extent, but no fewer than 128 values: so
    many bring the origin within a tenth of a standard deviation. Of a symbolic size, all.
    """
    size = batch_size(x, axes)
    parts = min(16, size // 128) if isinstance(size, int) else 1
    cuttable = [axis for axis in within if x.shape[axis] > 1] if parts > 1 else []
    if cuttable:
        axis = cuttable[0]
        x = lax.slice_in_dim(x, 0, -(-x.shape[axis] // parts), axis=axis)
    total = add_over(x.astype(statistics_dtype(x.dtype)), batch_axes(x, axes))
    return share(total, batch_size(x, axes))


def lower(context, x, *, axes):
    """A part that no device has to fetch from another."""
    within = local_axes(context, axes)
    part = functools.partial(mean_of_part, axes=axes, within=within)
    return mlir.lower_fun(part, multiple_results=False)(context, x)


def of_part(x, *, axes):
    """What these means look like."""
    return per_feature(x, axes).update(dtype=statistics_dtype(x.dtype))


part_p = Primitive("mean_of_part")
part_p.def_impl(
    lambda x, *, axes: mean_of_part(x, axes=axes, within=inner_axes(jax.typeof(x), axes))
)
part_p.def_abstract_eval(of_part)
batching.primitive_batchers[part_p] = batched(part_p)
mlir.register_lowering(part_p, lower)
