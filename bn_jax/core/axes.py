"""Which axes of an array are features, and how one value per feature lines up with the array.

Three instances: an activation ``[batch, channels]`` keeps its last axis; an image batch
``[batch, channels, height, width]`` keeps axis 1; a locally connected layer's
``[batch, height, width, channels]`` may keep ``(1, 2, 3)``. The axes that are *kept* are named;
statistics are taken over all the others.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from bn_jax.core.checks import as_integers, is_concrete

Axes = tuple[int, ...]
Size = Any
"""How many: an int, or under jax.export one of its symbolic sizes."""


def feature_axes(x: Array, feature_axis: SupportsIndex | Sequence[SupportsIndex]) -> Axes:
    """The kept axes as sorted, non-negative numbers.

    Raises:
        TypeError: an axis is no integer.
        ValueError: an axis is outside of x, or is named twice.
    """
    named = as_integers("feature_axis", feature_axis)
    outside = [axis for axis in named if not -x.ndim <= axis < x.ndim]
    if outside:
        raise ValueError(
            f"feature_axis={feature_axis} names axis {outside[0]}, but x has shape {x.shape}; "
            f"choose axes from {-x.ndim} to {x.ndim - 1}"
        )
    axes = tuple(sorted(axis % x.ndim for axis in named))
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"feature_axis={feature_axis} names one axis of x (shape {x.shape}) twice; "
            "name each feature axis once"
        )
    return axes


def batch_axes(x: Array, axes: Axes) -> Axes:
    """The axes that statistics are taken over: all but the features."""
    return tuple(axis for axis in range(x.ndim) if axis not in axes)


def feature_shape(x: Array, axes: Axes) -> tuple[Size, ...]:
    """The shape of one value per feature, in the order of x's own axes."""
    return tuple(x.shape[axis] for axis in axes)


def feature_spec(x: Array, axes: Axes) -> PartitionSpec:
    """How one value per feature is spread over an explicit mesh, where x is."""
    return PartitionSpec(*(jax.typeof(x).sharding.spec[axis] for axis in axes))


def shard_like(values: Any, spec: PartitionSpec) -> Any:
    """Values, sharded over the axes that a spec names, where their mesh is explicit.

    Per-feature values may be replicated where x's features are sharded, and the other way round.
    JAX combines them in sums and products, but in neither selections nor cotangents.
    """
    if values is None:
        return None
    sharding = jax.typeof(values).sharding
    same = sharding.mesh.empty or sharding.spec == spec
    return values if same else jax.sharding.reshard(values, sharding.update(spec=spec))


def for_each_feature(number: Size, x: Array, axes: Axes, dtype: DTypeLike) -> Array:
    """One number for each feature, spread over an explicit mesh as x is."""
    sharding = jax.typeof(x).sharding.update(spec=feature_spec(x, axes))
    return lax.full(feature_shape(x, axes), number, dtype, sharding=sharding)


def batch_size(x: Array, axes: Axes) -> Size:
    """How many values of x each feature has."""
    return math.prod(x.shape[axis] for axis in batch_axes(x, axes))


def collapse(x: Array, axes: Axes) -> tuple[Array, Axes]:
    """X and its feature axes, neighbours of one kind joined where x has more than six axes.

    jaxlib 0.10.2 and 0.11 crash on the CPU in reductions of rank 7 and 8 (jax-ml/jax#40412).
    """
    if x.ndim < 7:
        return x, axes
    groups = [list(group) for _, group in groupby(range(x.ndim), key=lambda axis: axis in axes)]
    joined = x.reshape([math.prod(x.shape[axis] for axis in group) for group in groups])
    return joined, tuple(n for n, group in enumerate(groups) if group[0] in axes)


def spread(values: Array, x: Array, axes: Axes) -> Array:
    """One value per feature, shaped to broadcast against x."""
    return values.reshape([n if axis in axes else 1 for axis, n in enumerate(x.shape)])


def spread_where(where: ArrayLike | Sequence[Any], x: Array, axes: Axes) -> Array:
    """A mask or weights, one for each value of x.

    Raises:
        TypeError: where is neither bool, integer nor float.
        ValueError: its shape fits neither x nor x without its feature axes, or (checked where
            the values are known, outside of a trace) a weight is negative or not a number.
    """
    where = where if isinstance(where, Array) else np.asarray(where)
    weighs = jnp.issubdtype(where.dtype, jnp.floating) or jnp.issubdtype(where.dtype, jnp.integer)
    if not (where.dtype == bool or weighs):
        raise TypeError(
            f"where has dtype {where.dtype}; give a bool mask (True counts), integers (how often "
            "each value counts) or float weights, e.g. where.astype(bool)"
        )
    full = tuple(where.shape)
    if where.ndim == x.ndim - len(axes):
        lengths = iter(where.shape)
        full = tuple(1 if axis in axes else next(lengths) for axis in range(x.ndim))
    if len(full) != x.ndim or any(a not in (1, b) for a, b in zip(full, x.shape, strict=True)):
        without = tuple(x.shape[axis] for axis in batch_axes(x, axes))
        raise ValueError(
            f"where has shape {where.shape}, which broadcasts neither to x {x.shape} nor to x "
            f"without its feature axes {without}; add axes of length 1, e.g. where[:, None, None]"
        )
    if where.dtype != bool and is_concrete(where):
        weights = np.asarray(where)
        if not (weights >= 0).all():
            raise ValueError(
                f"where holds the weight {weights[~(weights >= 0)][0]}; weights are counts or "
                "importances and cannot be negative or NaN"
            )
    where = jnp.asarray(where).reshape(full)
    # By arithmetic, since that also gives it x's sharding on an explicit mesh.
    return (
        where & jnp.ones_like(x, bool)
        if where.dtype == bool
        else where * jnp.ones_like(x, where.dtype)
    )
