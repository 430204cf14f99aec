"""The values of one batch norm, read and checked together: what comes in, and what goes out.

Three instances: a layer of a checkpoint, a state of ours on its way to torch, a layer whose scale
is of another length than its mean.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bn_jax.core.averages import BatchNormState
from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.normalize import BatchNormParams
from bn_jax.interop.checks import read_statistic, refusal
from bn_jax.interop.counts import long_seen, read_count

STATISTICS = ("mean", "var")


def read_layer(
    values: Mapping[str, Any], keys: Mapping[str, str], *, count: Any = 0, vector: bool = True
) -> tuple[BatchNormParams, BatchNormState]:
    """Parameters and state of what was found.

    float64 becomes float32 unless jax_enable_x64 is set, and half-precision statistics become
    float32, which holds them exactly; nothing else is rounded.

    Args:
        values: `mean`, `var`, and where they exist `scale`, `bias`.
        keys: what each is called in the checkpoint, for messages; of `count` too.
        count: how many batches, one number or one per feature. Statistics that are not those of a
            new layer get `LOADED` for 0.
        vector: all must be of shape [features]; otherwise any shape that they share.

    Raises:
        CheckpointError: a value is malformed, or its shape differs from that of mean.

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
        raise refusal(
            keys["mean"],
            f"has shape {mean.shape}",
            "one value per feature belongs here, of shape [features]: reshape it",
        )
    arrays["count"] = read_count(keys["count"], count)
    for name, array in arrays.items():
        if array.shape != mean.shape and not (name == "count" and array.ndim == 0):
            raise refusal(
                keys[name],
                f"has shape {array.shape}, but {keys['mean']} {mean.shape}",
                "all hold one value per feature of one layer: are they of the same one?",
            )
    arrays["count"] = long_seen(arrays["count"], mean, arrays["var"])
    have = {name: jnp.asarray(array) for name, array in arrays.items()}
    return (
        BatchNormParams(have.get("scale"), have.get("bias")),
        BatchNormState(have["mean"], have["var"], have["count"]),
    )


class Values(NamedTuple):
    """Our parameters and state as numpy, checked: what another library gets."""

    scale: np.ndarray | None
    bias: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]


def read_ours(params: BatchNormParams, state: BatchNormState, *, vector: bool = True) -> Values:
    """Our own values, checked likewise before another library gets them.

    Raises:
        CheckpointError: a value is malformed, or does not fit the others.
        TypeError: params or state is something else, or they are swapped.

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
        *map(np.array, state),  # copies, since torch.from_numpy wants them writable
    )
