"""Synchronizing after the fact: one state of replicas that kept their own.

Three instances: the states that pmap returns, one per device; running statistics of workers that
trained on their own data; flax's `batch_stats` of replicas that did not synchronize. What timm
calls distribute_bn, weighed by how much each replica has seen.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.moments import Moments, pool_with
from bn_jax.core.state import BatchNormState, batches_seen, read_state

States = TypeVar("States")
NAMES = BatchNormState._fields


def pool_states(states: States) -> States:
    """The states of replicas, stacked on a leading axis, as one.

    Each replica's statistics weigh as the number of batches that it has seen (loaded ones without a
    count, as in `advance`): with shares pᵣ = tᵣ/Σt,
    μ = Σ pᵣμᵣ and σ² = Σ pᵣ(σᵣ² + |μᵣ - μ|²); count = Σ t. Where averages are cumulative, batches
    of one size, and variances remembered as they are (unbiased=False), these are the moments of
    all that the replicas have seen; unbiased variances σᵣ² are m/(m - 1) times as large, with m of
    one replica's batch. A feature that no replica has seen stays as it is.

    Args:
        states: `BatchNormState`, or a tree of them (the layers of a network), with a leading axis
            over replicas in every array; a list of replicas is stacked first, by
            jax.tree.map(lambda *parts: jnp.stack(parts), *states). Mappings with `mean` and
            `var`, as in flax's `batch_stats`, are states too; without `count`, all replicas weigh
            the same.

    Returns:
        The same tree without the leading axis; statistics are float32 at least.

    Raises:
        TypeError: the tree holds an array that belongs to no state.
        ValueError: a state has no leading axis before that of its features, or one of length zero.

    >>> import jax.numpy as jnp
    >>> states = BatchNormState(jnp.array([[0.0], [3.0]]), jnp.ones((2, 1)), jnp.array([[2], [1]]))
    >>> pool_states(states)
    BatchNormState(mean=Array([1.], dtype=float32), var=Array([3.], dtype=float32), \
count=Array([3], dtype=int32))
    """
    return jax.tree.map(pool_state, states, is_leaf=is_state)


def is_state(node: Any) -> bool:
    """Whether a node of a tree is one layer's state."""
    named = isinstance(node, Mapping) and {"mean", "var"} <= node.keys() <= {*NAMES}
    return isinstance(node, BatchNormState) or named


def pool_state(states: Any) -> Any:
    """The states of one layer as one."""
    if not is_state(states):
        raise TypeError(
            f"the tree holds a {type(states).__name__} that belongs to no state; give "
            "BatchNormState, or mappings with mean and var, such as batch_stats"
        )
    if isinstance(states, BatchNormState):
        return BatchNormState(*pool_fields(states.mean, states.var, states.count))
    seen = states.get("count", jnp.ones(jnp.shape(states["mean"]), jnp.int32))
    pooled = pool_fields(states["mean"], states["var"], seen)
    pooled = dict(zip(NAMES, pooled, strict=True))
    return type(states)({name: pooled[name] for name in states})


def pool_fields(mean: Array, var: Array, count: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and count of all replicas, from those of each."""
    state = read_state(BatchNormState(mean, var, count))
    mean, var = (part.astype(statistics_dtype(part.dtype)) for part in state[:2])
    count = batches_seen(state)
    if mean.ndim < 2 or len(mean) == 0:
        raise ValueError(
            f"mean has shape {mean.shape}, but needs [replicas, features]; stack the replicas' "
            "states on a leading axis: jax.tree.map(lambda *parts: jnp.stack(parts), *states)"
        )
    pooled = pool_with(Moments(mean, var, count.astype(var.dtype)), add)
    total = jnp.sum(count, 0, dtype=count.dtype)
    return (
        lax.select(total > 0, pooled.mean[0], mean[0]),
        lax.select(total > 0, pooled.var[0], var[0]),
        total,
    )


def add(parts: Any) -> Any:
    """The sums over all replicas."""
    return jax.tree.map(lambda part: jnp.sum(part, 0, keepdims=True), parts)
