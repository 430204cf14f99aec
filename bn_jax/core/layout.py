"""Which axes are features, and how numbers per feature are shaped to broadcast against x.

Outside, numbers per feature have the shape of the features: [channels]. Inside, they have x's rank,
with length 1 on every axis that statistics are taken over: [1, 1, 1, channels]. So no function
inside needs to know the axes: data and numbers per feature broadcast against each other.

Three instances: an activation [batch, channels] keeps its last axis; an image [batch, channels,
height, width] keeps axis 1; a locally connected layer may keep (1, 2, 3).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from bn_jax.core.checks import as_integers, check_weights
from bn_jax.core.dtypes import real_dtype, statistics_dtype

Size = Any
"""How many: an int, or under jax.export one of its symbolic sizes."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of an array, and which of its axes are features: sorted, not negative."""

    shape: tuple[Size, ...]
    axes: tuple[int, ...]

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The axes that statistics are taken over: all but the features."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)

    @property
    def features(self) -> tuple[Size, ...]:
        """The shape of one number per feature, outside."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def count(self) -> Size:
        """How many values each feature has."""
        return math.prod(self.shape[axis] for axis in self.batch_axes)

    def bring_in(
        self, numbers: Array | None, x: Array, missing: float = 0.0, real: bool = False
    ) -> Array:
        """Numbers per feature with x's rank, in the dtype of statistics.

        Args:
            numbers: of the features' shape; None for a constant.
            x: the data. On an Explicit mesh, the result is sharded as x's features are.
            missing: the constant.
            real: whether the numbers are real even if x is complex, as variances are.
        """
        sizes = [n if axis in self.axes else 1 for axis, n in enumerate(self.shape)]
        dtype = statistics_dtype(x.dtype)
        dtype = real_dtype(dtype) if real else dtype
        if numbers is None:
            return lax.full(sizes, missing, dtype, sharding=number_sharding(self, x))
        spec = PartitionSpec(*(jax.typeof(x).sharding.spec[axis] for axis in self.axes))
        return shard_like(numbers, spec).astype(dtype).reshape(sizes)

    def take_out(self, numbers: Array) -> Array:
        """Numbers per feature in the shape of the features."""
        return numbers.reshape(self.features)

    def full_weights(self, where: ArrayLike | Sequence[Any] | None, x: Array) -> Array | None:
        """A mask or weights, one for each value of x; None where all count.

        Raises:
            TypeError: where is neither bool, integer nor float.
            ValueError: its shape fits neither x nor x without its feature axes, or (checked where
                the values are known, outside of a trace) a weight is negative or not a number.
        """
        if where is None:
            return None
        where = where if isinstance(where, Array) else np.asarray(where)
        check_weights(where)
        full = tuple(where.shape)
        if where.ndim == x.ndim - len(self.axes):
            lengths = iter(where.shape)
            full = tuple(1 if axis in self.axes else next(lengths) for axis in range(x.ndim))
        if len(full) != x.ndim or any(a not in (1, b) for a, b in zip(full, x.shape, strict=True)):
            without = tuple(x.shape[axis] for axis in self.batch_axes)
            raise ValueError(
                f"where has shape {where.shape}, which broadcasts neither to x {x.shape} nor to x "
                f"without its feature axes {without}; add axes of length 1, e.g. "
                "where[:, None, None]"
            )
        where = jnp.asarray(where).reshape(full)
        # By arithmetic, which also shards it as x is on an Explicit mesh.
        ones = jnp.ones_like(x, where.dtype)
        return where & ones if where.dtype == bool else where * ones


def read_layout(x: Array, feature_axis: SupportsIndex | Sequence[SupportsIndex]) -> Layout:
    """The layout of x by the axes that a caller names.

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
    return Layout(x.shape, axes)


def number_sharding(layout: Layout, x: Array) -> Any:
    """The sharding of numbers per feature inside, where x is on an Explicit mesh."""
    sharding = jax.typeof(x).sharding
    spec = [name if axis in layout.axes else None for axis, name in enumerate(sharding.spec)]
    return sharding.update(spec=spec)


def shard_like(numbers: Array, spec: PartitionSpec) -> Array:
    """Numbers, sharded over the axes that a spec names, where their mesh is Explicit.

    Numbers per feature may be replicated where x's features are sharded, and the other way round.
    JAX combines the two in sums and products, but in neither selections nor cotangents.
    """
    sharding = jax.typeof(numbers).sharding
    same = sharding.mesh.empty or sharding.spec == spec
    return numbers if same else jax.sharding.reshard(numbers, sharding.update(spec=spec))
