"""torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm: a state_dict in, a state_dict out.

Differs from ours in the words: `weight`, `bias` are scale and bias, `momentum` is the weight of the
new batch (decay = 1 - momentum; None is `CumulativeAverage`). The running variance is unbiased in
both, the default ε the same. torch's data have their features on axis 1: pass `feature_axis=1` for
data in that layout.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from bn_jax.core.averages import Average, BatchNormState, CumulativeAverage, Ema
from bn_jax.core.normalize import BatchNormParams
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
    """One batch norm of a state_dict.

    Args:
        state_dict: of the layer or of a whole model, tensors or arrays; or the path of a
            safetensors file.
        prefix: the layer's name in the model, e.g. "layer1.0.bn1".
        momentum: as the layer was made; it is not in a state_dict. None averages all batches alike.
        eps: as the layer was made; likewise.
        count: where `num_batches_tracked` is absent, as in files older than torch 0.4.1. It matters
            for an average that depends on it, such as momentum=None. If either is 0, statistics
            that are not those of a new layer count as long seen
            (`bn_jax.core.averages.LOADED`), so that the first batch does not replace them.

    Returns:
        (params, state, settings): scale or bias are None where weight or bias are absent; the
        values are exactly torch's.

    Raises:
        CheckpointError: an entry is missing, extra, wrongly shaped, not finite, or no array; the
            variance is negative; the file is no safetensors file.
        ValueError: momentum is outside of [0, 1], or eps is negative.

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
    start = join(prefix, "")
    refuse_extra(
        (key for key in map(str, state_dict) if key.startswith(start)),
        names.values(),
        f"give the name of one batch norm as prefix; these have statistics: {layers(state_dict)}",
    )
    remedy = (
        f"give the name of one batch norm as prefix; these have statistics: {layers(state_dict)}. "
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
    """The state_dict of one batch norm, and the arguments to make its layer with.

    A `DebiasedEma` becomes the momentum of its decay, which is the same in evaluation, and once
    some 1/(1 - decay) batches are seen, in training too.

    Args:
        params: as the core has them, of shape [features].
        state: likewise.
        settings: as `from_torch` and the like return them, or a dict of average, epsilon, unbiased.
        prefix: the layer's name in the model.
        count: of batches, where those of the state differ between features.
        values_per_feature: m. If settings are biased, the variance gets m/(m - 1), by which torch
            goes on; None copies it. See `bn_jax.interop.settings` on when it matters.

    Returns:
        (state_dict, arguments): arrays by torch's names; momentum, eps and affine for
        `torch.nn.BatchNorm2d(features, **arguments)`. Where scale alone is None, weight is 1, since
        torch has no bias without it; where bias alone is None, arguments say bias=False, which
        needs a torch that has it.

    Raises:
        CheckpointError: a value is malformed; torch has no such average; counts differ.
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
    """A key of a state_dict.

    >>> join("layer1.0", "weight"), join("", "weight")
    ('layer1.0.weight', 'weight')
    """
    prefix = prefix.removesuffix(".")
    return f"{prefix}.{name}" if prefix else name


def layers(state_dict: Mapping[str, Any]) -> str:
    """The batch norms that a state_dict has, for a message.

    >>> layers({"bn1.running_mean": 0, "fc.weight": 0})
    "'bn1'"
    """
    ending = "running_mean"
    keys = [key for key in map(str, state_dict) if key.endswith(ending)]
    return some(key.removesuffix(ending).removesuffix(".") for key in keys)


def average_of(momentum: float | None) -> Average:
    """What torch's momentum means.

    Raises:
        ValueError: momentum is outside of [0, 1].

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
    """1 - decay, written as short as it was: 0.1 of 0.9, not 0.09999999999999998.

    >>> complement(0.9), complement(0.999), complement(1.0)
    (0.1, 0.001, 0.0)
    """
    short = round(1 - decay, 12)
    return short if 1 - short == decay else 1 - decay
