"""What a batch norm of Flax, ours or its own, has normalized in one pass through the network."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from bn_jax.core.checks import is_concrete
from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.layout import read_layout
from bn_jax.core.moments import Moments, measure, merge, pool
from bn_jax.core.state import BatchNormState
from bn_jax.layers.translate import read_mask


def observe(seen: Moments, layer: Any, x: ArrayLike, mask: ArrayLike | None = None) -> Moments:
    """What a layer has seen, with x, by its settings; a layer that is used twice sees both."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)  # as Flax takes integers
    axes = read_layout(x, layer.axis).axes
    moments = measure(x, feature_axis=axes, where=read_mask(mask, x, axes))
    if layer.axis_name is not None:
        moments = pool(moments, layer.axis_name, axis_index_groups=layer.axis_index_groups)
    return merge(seen, lax.stop_gradient(moments))


def replace(old: Array, new: Array, state: BatchNormState) -> Array:
    """The new values of a layer's variable where the population is known, else the old ones."""
    dtype = statistics_dtype(old.dtype) if jnp.issubdtype(old.dtype, jnp.inexact) else old.dtype
    return jnp.where(state.count > 0, new.astype(dtype), old.astype(dtype))


def check_batches(batches: object) -> None:
    """Refuse one batch in the place of several: each of its rows would be taken for a batch.

    Raises:
        ValueError: batches are an array of numbers, examples by features.
    """
    if not isinstance(batches, Array | np.ndarray) or batches.ndim > 2:
        return
    if jnp.issubdtype(batches.dtype, jnp.inexact):  # a row of integers may be a batch of tokens
        raise ValueError(
            f"the batches are one array of shape {batches.shape}, whose rows would be taken for "
            "batches; give a list of batches, e.g. [x] for one, or list(x) if each row is one"
        )


def check_known(states: dict[Any, BatchNormState]) -> None:
    """Refuse statistics of nothing, which would leave all as it was.

    Raises:
        ValueError: no batch norm has seen a value.
    """
    counts = [state.count for state in states.values()]
    if all(map(is_concrete, counts)) and not any(np.any(count) for count in counts):
        raise ValueError(
            "no batch norm normalized by the batch, or nothing was finite, so there are no "
            "statistics to take; call the model as in training: train=True or "
            "use_running_average=False, or model.train() before"
        )
