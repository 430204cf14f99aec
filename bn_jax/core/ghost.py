"""Ghost batch normalization: each group of examples by its own statistics.

Hoffer, Hubara & Soudry (2017), algorithm 1. Groups are neighbours on the leading batch axis.
Examples left over are a last, smaller group, which is filled up with values that are masked out.
Inside, groups are one more feature axis, so nothing else has to know of them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bn_jax.core.layout import Layout


@dataclasses.dataclass(frozen=True)
class Groups:
    """How an axis of x is cut into groups: [examples] to [groups, size].

    Attributes:
        axis: the leading batch axis.
        examples: its length.
        size: examples per group.
    """

    axis: int
    examples: int
    size: int

    @property
    def missing(self) -> int:
        """How many examples the last group lacks."""
        return -self.examples % self.size

    @property
    def smallest(self) -> int:
        """How many examples the smallest group has."""
        return self.examples % self.size or self.size

    def split(self, x: Array) -> Array:
        """Data, with the axis cut in two and the last group filled up with zeros."""
        if self.missing:
            x = jnp.pad(x, [(0, self.missing * (n == self.axis)) for n in range(x.ndim)])
        groups = x.shape[self.axis] // self.size
        return x.reshape(*x.shape[: self.axis], groups, self.size, *x.shape[self.axis + 1 :])

    def split_batch(self, x: Array, weights: Array | None) -> tuple[Array, Array | None]:
        """Data and weights, split; what fills up the last group is masked out."""
        if self.missing and weights is None:
            weights = jnp.ones_like(x, bool)
        return self.split(x), None if weights is None else self.split(weights)

    def join(self, x: Array) -> Array:
        """The inverse of `split`."""
        x = x.reshape(*x.shape[: self.axis], -1, *x.shape[self.axis + 2 :])
        return lax.slice_in_dim(x, 0, self.examples, axis=self.axis)

    def repeat(self, numbers: Array) -> Array:
        """Numbers per feature, for each group."""
        groups = (self.examples + self.missing) // self.size
        numbers = jnp.expand_dims(numbers, self.axis)
        shape = [groups if n == self.axis else size for n, size in enumerate(numbers.shape)]
        return jnp.broadcast_to(numbers, shape)

    def add(self, parts: Any) -> Any:
        """The sums over groups of numbers per group and feature."""
        return jax.tree.map(lambda part: jnp.sum(part, self.axis, keepdims=True), parts)

    def drop_axis(self, numbers: Array) -> Array:
        """Numbers that are the same for all groups, without their axis."""
        return lax.squeeze(numbers, [self.axis])


def read_groups(layout: Layout, x: Array, group_size: object) -> Groups | None:
    """The groups of the leading batch axis; None if x has no batch axis or group_size is None.

    Raises:
        TypeError: group_size is traced, or no integer.
        ValueError: group_size is not positive, or a group spans shards of an Explicit mesh.
    """
    if group_size is None:
        return None
    if not isinstance(group_size, int | np.integer):
        raise TypeError(f"group_size={group_size} must be a Python int, e.g. 32")
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be positive, e.g. 32")
    if not layout.batch_axes:
        return None
    axis = layout.batch_axes[0]
    examples, shard = x.shape[axis], shard_length(x, axis)
    if group_size < examples and shard < examples and shard % group_size:
        raise ValueError(
            f"group_size={group_size} spans shards of {shard} examples of an explicit mesh; "
            f"choose a divisor of {shard}, or shard the batch over an Auto mesh"
        )
    return Groups(axis, examples, min(int(group_size), examples) or 1)


def shard_length(x: Array, axis: int) -> Any:
    """The length of an axis on each device of an explicit mesh; elsewhere, all of it."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return x.shape[axis] // math.prod(sharding.mesh.shape[name] for name in names)
