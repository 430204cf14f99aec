"""Ghost batch normalization: each group of examples by its own statistics.

Hoffer, Hubara & Soudry (2017), algorithm 1. The groups become one more feature axis, so nothing new
is computed; what is remembered are their moments, pooled: those of the whole batch.
"""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bn_jax.core.axes import Axes, batch_axes, feature_shape
from bn_jax.core.moments import Moments, pool_about
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.replicas import Replicas, sum_over
from bn_jax.core.standardize import standardize


def standardize_groups(
    group_size: int,
    axes: Axes,
    replicas: Replicas | None,
    x: Array,
    params: BatchNormParams,
    epsilon: Array,
    weights: Array | None,
) -> tuple[Array, Array, Moments]:
    """Y, normalized group by group; an origin, and the moments about it of all replicas' groups.

    Groups are neighbours on the leading batch axis. What is left over is a last, smaller group.
    """
    lead, features = batch_axes(x, axes)[0], feature_shape(x, axes)
    examples = x.shape[lead]
    group_size = min(group_size, examples) or 1
    groups = -(-examples // group_size)
    if examples % group_size:
        weights = jnp.ones_like(x, bool) if weights is None else weights
        missing = [(0, groups * group_size - examples if n == lead else 0) for n in range(x.ndim)]
        x, weights = jnp.pad(x, missing), jnp.pad(weights, missing)
    whole = x.shape
    split = (*whole[:lead], groups, group_size, *whole[lead + 1 :])
    place = sum(axis < lead for axis in axes)  # of the groups among the features
    per_group = (*features[:place], groups, *features[place:])

    x, weights = jax.tree.map(lambda values: values.reshape(split), (x, weights))
    params = jax.tree.map(
        lambda values: jnp.broadcast_to(jnp.expand_dims(values, place), per_group), params
    )
    axes = (*axes[:place], lead, *(axis + 1 for axis in axes[place:]))
    y, origin, near = standardize(axes, None, x, params, epsilon, weights)

    def add(parts: Any) -> Any:
        sums = jax.tree.map(lambda part: jnp.sum(part, place, keepdims=True), parts)
        return sum_over(sums, replicas)

    pooled = pool_about(origin, near, add)
    origin, near = jax.tree.map(lambda part: part.reshape(features), pooled)
    return lax.slice_in_dim(y.reshape(whole), 0, examples, axis=lead), origin, near


def smallest_group(x: Array, axes: Axes, group_size: int) -> int:
    """How many values each feature has in the smallest group.

    Raises:
        TypeError: group_size is traced, or no integer.
        ValueError: group_size is not positive, or a group spans shards of an explicit mesh.
    """
    if isinstance(group_size, jax.core.Tracer) or not isinstance(group_size, int | np.integer):
        raise TypeError(f"group_size={group_size} must be a Python int, e.g. 32")
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be positive, e.g. 32")
    lengths = [x.shape[axis] for axis in batch_axes(x, axes)]
    if lengths and group_size < lengths[0]:
        shard = shard_length(x, batch_axes(x, axes)[0])
        if shard % group_size and shard < lengths[0]:
            raise ValueError(
                f"group_size={group_size} spans shards of {shard} examples of an explicit mesh; "
                f"choose a divisor of {shard}, or spread the batch over an Auto mesh"
            )
    examples = [length % group_size or min(length, group_size) for length in lengths[:1]]
    return math.prod(examples + lengths[1:])


def shard_length(x: Array, axis: int) -> int:
    """The length of an axis on each device of an explicit mesh; elsewhere, all of it."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return x.shape[axis] // math.prod(sharding.mesh.shape[name] for name in names)
