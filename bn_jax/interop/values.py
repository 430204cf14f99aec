"""Reads and checks the values of one batch norm together, from a checkpoint or for another library.

For example, it refuses a layer whose scale and mean have different lengths.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import BatchNormState
from bn_jax.interop.checks import checkpoint_error, read_statistic
from bn_jax.interop.counts import count_loaded, read_count

STATISTICS = ("mean", "var")


def read_layer(
    values: Mapping[str, Any], keys: Mapping[str, str], *, count: Any = 0, vector: bool = True
) -> tuple[BatchNormParams, BatchNormState]:
    """Parameters and state from the values of one layer.

    float64 becomes float32 unless jax_enable_x64 is set. Half-precision statistics become float32,
    which holds them exactly. Nothing else is rounded.

    Args:
        values: `mean`, `var`, and where they exist `scale`, `bias`.
        keys: the name of each value, and of `count`, in the checkpoint, for messages.
        count: the number of batches, for all features or for each. 0 becomes `LOADED` where the
            statistics are not those of a new layer.
        vector: all values must have the shape [features]; otherwise they may share any shape.

    Raises:
        CheckpointError: a value is malformed, or its shape differs from the mean's.

    >>> params, state = read_layer({"mean": [0.5], "var": [2.0]}, {}, count=3)
    >>> params, state.count.tolist()
    (BatchNormParams(scale=None, bias=None), [3])
    """
    keys = {name: keys.get(name, name) for name in (*values, "count")}
    arrays = {
        name: read_statistic(keys[name], value, positive=name == "var")
        for name, value in values.items()
        if value is not None or name in STATISTICS
    }
    arrays |= {
        name: arrays[name].astype(statistics_dtype(arrays[name].dtype)) for name in STATISTICS
    }
    mean = arrays["mean"]
    if vector and mean.ndim != 1:
        raise checkpoint_error(
            keys["mean"],
            f"has shape {mean.shape}",
            "one value per feature belongs here, of shape [features]: reshape it",
        )
    arrays["count"] = read_count(keys["count"], count)
    for name, array in arrays.items():
        if array.shape != mean.shape and not (name == "count" and array.ndim == 0):
            raise checkpoint_error(
                keys[name],
                f"has shape {array.shape}, but {keys['mean']} {mean.shape}",
                "all hold one value per feature: check that they belong to the same layer",
            )
    arrays["count"] = count_loaded(arrays["count"], mean, arrays["var"])
    have = {name: jnp.asarray(array) for name, array in arrays.items()}
    return (
        BatchNormParams(have.get("scale"), have.get("bias")),
        BatchNormState(have["mean"], have["var"], have["count"]),
    )


class Values(NamedTuple):
    """Our parameters and state as checked numpy arrays, for another library.

    >>> one, many = np.ones(2), np.array([7, 7])
    >>> Values(scale=one, bias=None, mean=one, var=one, count=many).count.tolist()
    [7, 7]
    """

    scale: np.ndarray | None
    bias: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]


def read_ours(params: BatchNormParams, state: BatchNormState, *, vector: bool = True) -> Values:
    """Check our own values and convert them to numpy, for another library.

    Raises:
        CheckpointError: a value is malformed, or does not fit the others.
        TypeError: params or state has another type, or they are swapped.

    >>> import bn_jax as bn
    >>> read_ours(*bn.init(2, use_bias=False)).count.tolist()
    [0, 0]
    """
    for name, value, kind in (
        ("params", params, BatchNormParams),
        ("state", state, BatchNormState),
    ):
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} is {type(value).__name__}, but must be a {kind.__name__}; pass params and "
                "state in this order, as bn_jax.init and the from_ functions return them"
            )
    values = {**params._asdict(), "mean": state.mean, "var": state.var}
    keys = {name: f"{'params' if name in params._fields else 'state'}.{name}" for name in values}
    params, state = read_layer(
        values, keys | {"count": "state.count"}, count=state.count, vector=vector
    )
    return Values(
        None if params.scale is None else np.array(params.scale),
        None if params.bias is None else np.array(params.bias),
        *map(np.array, state),  # copies, because torch.from_numpy needs writable arrays
    )
