"""Sums over the members of a named axis: of vmap, shard_map or pmap.

Three instances: all devices of a mesh axis; the examples of one batch under vmap; pairs of
devices, as axis_index_groups of a larger axis.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisName = str | tuple[str, ...]
AxisIndexGroups = Sequence[Sequence[int]]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Which members share statistics: all of a named axis (or several), or groups of one.

    Attributes:
        axis_name: bound by vmap, shard_map or pmap.
        groups: a partition of the members' indices, or None for all together.
    """

    axis_name: AxisName
    groups: tuple[tuple[int, ...], ...] | None = None

    @property
    def fewest(self) -> int:
        """How many members share statistics, in the smallest group."""
        return min(map(len, self.groups)) if self.groups else lax.axis_size(self.axis_name)


def read_replicas(
    axis_name: AxisName | None, axis_index_groups: AxisIndexGroups | None
) -> Replicas | None:
    """The two arguments as one, or None where each member stands for itself.

    Raises:
        NameError: axis_name is not bound here.
        ValueError: the groups are without an axis name or with several, or do not hold each
            index of the axis once.
    """
    if axis_name is None:
        if axis_index_groups is None:
            return None
        raise ValueError(
            f"axis_index_groups={axis_index_groups} are groups of no axis; name it, e.g. "
            "axis_name='devices'"
        )
    try:
        members = lax.axis_size(axis_name)
    except NameError as error:
        raise NameError(
            f"axis_name={axis_name!r} is not bound here; bind it where the batch is split, "
            f"e.g. jax.vmap(f, axis_name={axis_name!r}) or jax.shard_map, or leave it out "
            "for the statistics of this array alone"
        ) from error
    if axis_index_groups is None:
        return Replicas(axis_name)
    if not isinstance(axis_name, str) and len(axis_name) > 1:
        raise ValueError(
            f"axis_index_groups={axis_index_groups} are of one axis, but axis_name={axis_name} "
            "names several; leave the groups out and name the axes to pool over"
        )
    groups = tuple(tuple(np.ravel(group).tolist()) for group in axis_index_groups)
    nested = all(np.ndim(group) == 1 for group in axis_index_groups)
    if not nested or not all(groups) or sorted(sum(groups, ())) != list(range(members)):
        raise ValueError(
            f"axis_index_groups={axis_index_groups} must hold each of the {members} indices of "
            f"axis {axis_name!r} once, e.g. {[[*range(members)]]}"
        )
    return Replicas(axis_name, groups)


def sum_over(values: Tree, replicas: Replicas | None) -> Tree:
    """Arrays summed over the members that share statistics, in one collective.

    With groups, each member writes its values into its group's row and zeros into the others. One
    psum adds up all rows, and each member reads its own group's. JAX's psum knows groups neither
    under vmap nor under shard_map's default checks.
    """
    if replicas is None:
        return values
    if replicas.groups is None:
        return psum(values, replicas.axis_name)
    numbers = np.zeros(sum(map(len, replicas.groups)), np.int32)
    for number, group in enumerate(replicas.groups):
        numbers[list(group)] = number
    own = jnp.asarray(numbers)[lax.axis_index(replicas.axis_name)]
    mine = jnp.arange(len(replicas.groups)) == own

    def in_own_row(value: jax.Array) -> jax.Array:
        here = mine.reshape(-1, *[1] * value.ndim)
        return jnp.where(here, value[None], jnp.zeros_like(value[None]))

    rows = psum(jax.tree.map(in_own_row, values), replicas.axis_name)
    return jax.tree.map(lambda row: lax.dynamic_index_in_dim(row, own, keepdims=False), rows)


def psum(values: Tree, axis_name: AxisName) -> Tree:
    """JAX's own, with an error that says what to do where it has none.

    Raises:
        NotImplementedError: a name is bound by vmap inside of shard_map with checks.
    """
    try:
        return lax.psum(values, axis_name)
    except (AssertionError, TypeError, ValueError) as error:
        if not jax.sharding.get_abstract_mesh().manual_axes:
            raise
        raise NotImplementedError(
            f"axis_name={axis_name!r}: under shard_map's checks, JAX cannot sum over what vmap "
            "binds inside (jax 0.8 not under vmap at all); use jax.shard_map(..., check_vma=False)"
        ) from error
