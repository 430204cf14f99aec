"""Converts torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm, from and to a state_dict.

torch calls scale and bias `weight` and `bias`. Its `momentum` is the weight of the new batch:
decay = 1 - momentum, and None is `CumulativeAverage`. As in our core, the running variance is
unbiased and ε is 1e-5 by default. torch's data have their features on axis 1; pass
`feature_axis=1` for data in that layout.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from bn_jax.core.averages import Average, CumulativeAverage, Ema
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import BatchNormState
from bn_jax.interop.checks import read_mapping, refuse_extra, require, some
from bn_jax.interop.counts import one_count
from bn_jax.interop.files import read_file
from bn_jax.interop.settings import (
    Settings,
    decay_of,
    read_epsilon,
    read_outgoing,
)
from bn_jax.interop.values import read_layer

NAMES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}


REMEDY = "pass model.state_dict(); nothing is unpickled here"


def from_torch(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    prefix: str = "",
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    count: int = 0,
) -> tuple[BatchNormParams, BatchNormState, Settings]:
    """Convert one batch norm of a torch state_dict.

    Args:
        state_dict: of the layer or of a whole model, tensors or arrays; or the path of a
            safetensors file.
        prefix: the layer's name in the model, e.g. "layer1.0.bn1".
        momentum: of the layer's constructor; it is not in a state_dict. None is a plain mean over
            all batches.
        eps: of the layer's constructor.
        count: the number of batches seen, for files without `num_batches_tracked`, which are older
            than torch 0.4.1. It matters for averages that depend on it, such as momentum=None. If
            the number is 0 and the statistics are not those of a new layer, it becomes
            `bn_jax.core.state.LOADED`, so that the first batch does not replace them.

    Returns:
        (params, state, settings). scale or bias is None where weight or bias is absent. The values
        are exactly torch's.

    Raises:
        CheckpointError: an entry is missing, unknown, of the wrong shape, not finite, or not an
            array; the variance is negative; the file is not a safetensors file.
        ValueError: momentum is outside [0, 1], or eps is negative.

    >>> import numpy as np, bn_jax as bn
    >>> state_dict = {"bn1.running_mean": np.zeros(3), "bn1.running_var": np.ones(3),
    ...     "bn1.num_batches_tracked": np.array(7)}
    >>> params, state, settings = from_torch(state_dict, "bn1")
    >>> settings
    {'average': Ema(decay=0.9), 'epsilon': 1e-05, 'unbiased': True}
    >>> y, state = bn.batch_norm(np.ones((4, 3), np.float32), params, state, train=True, **settings)
    >>> state.count.tolist()
    [8, 8, 8]
    """
    if isinstance(state_dict, str | os.PathLike):
        state_dict = read_file(state_dict)
    state_dict = read_mapping("state_dict", state_dict, REMEDY)
    names = {field: join(prefix, name) for field, name in NAMES.items()}
    start, known = join(prefix, ""), layer_names(state_dict)
    refuse_extra(
        (key for key in map(str, state_dict) if key.startswith(start)),
        names.values(),
        f"give the name of one batch norm as prefix; these have statistics: {known}",
    )
    remedy = (
        f"give the name of one batch norm as prefix; these have statistics: {known}. "
        "A layer with track_running_stats=False has none to convert"
    )
    found = {
        "scale": state_dict.get(names["scale"]),
        "bias": state_dict.get(names["bias"]),
        "mean": require(state_dict, names["mean"], remedy),
        "var": require(state_dict, names["var"], remedy),
    }
    seen = state_dict.get(names["count"], count)
    params, state = read_layer(found, names, count=seen)
    settings = Settings(average=average_of(momentum), epsilon=read_epsilon(eps), unbiased=True)
    return params, state, settings


def to_torch(
    params: BatchNormParams,
    state: BatchNormState,
    settings: Settings,
    prefix: str = "",
    *,
    count: int | None = None,
    values_per_feature: float | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Convert to the state_dict of one torch batch norm, and the arguments for its constructor.

    A `DebiasedEma` becomes the momentum with the same decay. Evaluation is the same; training is
    the same once about 1/(1 - decay) batches have been seen.

    Args:
        params: our parameters, of shape [features].
        state: our state.
        settings: average, epsilon and unbiased, as the `from_…` functions return them.
        prefix: the layer's name in the model.
        count: the number of batches, if it differs between the features of the state.
        values_per_feature: m, to convert a biased variance to torch's unbiased one by m/(m - 1).
            None copies it. `bn_jax.interop.settings` explains when this matters.

    Returns:
        (state_dict, arguments): arrays by torch's names; momentum, eps and affine for
        `torch.nn.BatchNorm2d(features, **arguments)`. If only scale is None, weight is 1, because
        torch has no bias without weight. If only bias is None, arguments contain bias=False, which
        old versions of torch do not accept.

    Raises:
        CheckpointError: a value is malformed; torch does not have this average; counts differ.
        ValueError: values_per_feature is not above 1.

    >>> import bn_jax as bn
    >>> settings = {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": True}
    >>> state_dict, arguments = to_torch(*bn.init(3), settings, "bn1")
    >>> sorted(state_dict)[:3], arguments
    (['bn1.bias', 'bn1.num_batches_tracked', 'bn1.running_mean'], \
{'eps': 1e-05, 'momentum': 0.1, 'affine': True})
    """
    ours = read_outgoing(
        params, state, settings, unbiased=True, values_per_feature=values_per_feature
    )
    average = settings["average"]
    affine = params.scale is not None or params.bias is not None
    arguments: dict[str, Any] = {
        "eps": read_epsilon(settings["epsilon"]),
        "momentum": None
        if isinstance(average, CumulativeAverage)
        else complement(decay_of(settings, "torch")),
        "affine": affine,
    }
    entries: dict[str, Any] = {}
    if affine:
        entries["weight"] = np.ones_like(ours.var) if ours.scale is None else ours.scale
        if ours.bias is None:
            arguments["bias"] = False
        else:
            entries["bias"] = ours.bias
    entries |= {
        "running_mean": ours.mean,
        "running_var": ours.var,
        "num_batches_tracked": np.asarray(one_count(ours.count, count), np.int64),
    }
    return {join(prefix, name): value for name, value in entries.items()}, arguments


def join(prefix: str, name: str) -> str:
    """Join a layer's name and an entry's name into a key of a state_dict.

    >>> join("layer1.0", "weight"), join("", "weight")
    ('layer1.0.weight', 'weight')
    """
    prefix = prefix.removesuffix(".")
    return f"{prefix}.{name}" if prefix else name


def layer_names(state_dict: Mapping[str, Any]) -> str:
    """The names of the batch norms in a state_dict, for a message.

    >>> layer_names({"bn1.running_mean": 0, "fc.weight": 0})
    "'bn1'"
    """
    ending = "running_mean"
    keys = [key for key in map(str, state_dict) if key.endswith(ending)]
    return some(key.removesuffix(ending).removesuffix(".") for key in keys)


def average_of(momentum: float | None) -> Average:
    """The moving average for a torch momentum.

    Raises:
        ValueError: momentum is outside [0, 1].

    >>> average_of(0.1), average_of(None)
    (Ema(decay=0.9), CumulativeAverage())
    """
    if momentum is None:
        return CumulativeAverage()
    momentum = float(momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} is outside of [0, 1]; torch's default is 0.1")
    return Ema(1 - momentum)


def complement(decay: float) -> float:
    """1 - decay as a short decimal: 0.1 for 0.9, not 0.09999999999999998.

    >>> complement(0.9), complement(0.999), complement(1.0)
    (0.1, 0.001, 0.0)
    """
    short = round(1 - decay, 12)
    return short if 1 - short == decay else 1 - decay
