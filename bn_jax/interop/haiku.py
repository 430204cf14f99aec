"""Converts haiku.BatchNorm, from and to its entries in params and state.

haiku calls bias `offset` and our decay `decay_rate`. The running statistics are the `average`s of
two ExponentialMovingAverages, `mean_ema` and `var_ema`. Each also keeps a `counter` t and a
`hidden` that starts at zero, with average = hidden/(1 - decayᵗ). That is our `DebiasedEma`, which
needs no hidden. All values have the data's rank, such as [1, 1, 1, features]. The running variance
is biased.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.core.averages import DebiasedEma, Ema
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import BatchNormState
from bn_jax.interop.checks import (
    checkpoint_error,
    read_array,
    read_mapping,
    read_statistic,
    refuse_extra,
    require,
    some,
)
from bn_jax.interop.counts import one_count, read_one_count
from bn_jax.interop.settings import (
    Settings,
    as_settings,
    debias,
    decay_of,
    read_epsilon,
    read_outgoing,
)
from bn_jax.interop.values import read_layer


def from_haiku(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    name: str = "batch_norm",
    *,
    decay_rate: float,
    eps: float = 1e-5,
    zero_debias: bool = True,
    values_per_feature: float | None = None,
) -> tuple[BatchNormParams, BatchNormState, Settings]:
    """Convert one BatchNorm of a haiku model's params and state.

    Args:
        params: of the whole model: module name -> {scale, offset}.
        state: of the whole model: module name -> {counter, hidden, average}.
        name: of the BatchNorm, e.g. "res_net50/~/initial_batchnorm".
        decay_rate: of the layer's constructor.
        eps: of the layer's constructor.
        zero_debias: of the averages' constructor. haiku.BatchNorm debiases. False gives `Ema`.
        values_per_feature: m, to convert the variance to the core's unbiased one by m/(m - 1).
            None copies haiku's biased one. See `bn_jax.interop.settings`.

    Returns:
        (params, state, settings), with shapes [features]. scale or bias is None where scale or
        offset is absent. The running statistics are exactly haiku's averages.

    Raises:
        CheckpointError: an entry is missing, unknown, of the wrong shape, not finite, or not an
            array; the variance is negative; hidden and average contradict decay_rate.
        ValueError: decay_rate is outside [0, 1], eps is negative, or values_per_feature is not
            above 1.

    >>> import numpy as np
    >>> def ema(hidden, average):
    ...     return {"counter": np.array(1), "hidden": np.array([[hidden]], np.float32),
    ...         "average": np.array([[average]], np.float32)}
    >>> state = {"batch_norm/~/mean_ema": ema(0.2, 2.0), "batch_norm/~/var_ema": ema(0.4, 4.0)}
    >>> params, state, settings = from_haiku({}, state, decay_rate=0.9)
    >>> params.scale, state.var.tolist(), state.count.tolist(), settings["average"]
    (None, [4.0], [1], DebiasedEma(decay=0.9))
    """
    remedy = "pass params and state as init and apply return them"
    params, state = read_mapping("params", params, remedy), read_mapping("state", state, remedy)
    affine = read_mapping(name, params.get(name, {}), remedy)
    refuse_extra(affine, ("scale", "offset"), f"params[{name!r}] is not a BatchNorm's: check name")
    keys = {"scale": f"{name}.scale", "bias": f"{name}.offset"}
    found = {"scale": affine.get("scale"), "bias": affine.get("offset")}
    counters = {}
    for field, ema in (("mean", f"{name}/~/mean_ema"), ("var", f"{name}/~/var_ema")):
        norms = some(key.removesuffix("/~/mean_ema") for key in state if key.endswith("/mean_ema"))
        entry = require(state, ema, f"give the name of a BatchNorm; state has these: {norms}")
        entry = read_mapping(ema, entry, remedy)
        refuse_extra(
            entry, ("counter", "hidden", "average"), f"state[{ema!r}] is not an average: check name"
        )
        keys[field] = f"{ema}.average"
        found[field] = require(entry, "average", f"state[{ema!r}] needs it")
        counter = f"{ema}.counter"
        seen = require(entry, "counter", f"state[{ema!r}] needs it")
        counters[field] = read_one_count(counter, seen)
        check_hidden(ema, entry, counters[field], decay_rate, zero_debias)
    if counters["mean"] != counters["var"]:
        raise checkpoint_error(
            f"{name}/~/var_ema.counter",
            f"is {counters['var']}, but that of mean_ema is {counters['mean']}",
            "haiku updates both together: check that they belong to the same checkpoint",
        )
    flat = {
        field: None if value is None else squeeze(keys[field], value)
        for field, value in found.items()
    }
    decay_rate = float(decay_rate)
    ours, memory = read_layer(flat, keys, count=counters["mean"])
    average = DebiasedEma(decay_rate) if zero_debias else Ema(decay_rate)
    memory, settings = as_settings(memory, average, eps, values_per_feature)
    return ours, memory, settings


def to_haiku(
    params: BatchNormParams,
    state: BatchNormState,
    settings: Settings,
    name: str = "batch_norm",
    *,
    ndim: int,
    axis: int = -1,
    count: int | None = None,
    values_per_feature: float | None = None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Convert to the entries of one haiku BatchNorm, and the arguments for its constructor.

    haiku always debiases, so an `Ema` becomes a debiased average with the same decay. Evaluation is
    the same; training is the same once about 1/(1 - decay) batches have been seen.

    Args:
        params: our parameters, of shape [features].
        state: our state.
        settings: average, epsilon and unbiased, as the `from_…` functions return them.
        name: of the BatchNorm.
        ndim: the rank of the layer's data, and so of its values: 2 for [batch, features].
        axis: the feature axis of the data; 1 for data_format="channels_first".
        count: the number of batches, if it differs between the features of the state. If it is 0
            although the statistics are not those of a new layer, it becomes
            `bn_jax.core.state.LOADED`.
        values_per_feature: m, to convert an unbiased variance to haiku's biased one by (m - 1)/m.
            None copies it. `bn_jax.interop.settings` explains when this matters.

    Returns:
        (params, state, arguments). Merge the first two into those of the model; arguments are
        create_scale, create_offset, decay_rate and eps. `average` and `counter` are those of our
        state, and `hidden` is average·(1 - decayᵗ), rounded once.

    Raises:
        CheckpointError: a value is malformed; haiku does not have this average; counts differ.
        ValueError: values_per_feature is not above 1; axis is out of range for ndim.

    >>> import bn_jax as bn
    >>> settings = {"average": bn.DebiasedEma(0.99), "epsilon": 1e-5, "unbiased": False}
    >>> params, state, arguments = to_haiku(*bn.init(3), settings, ndim=4)
    >>> params["batch_norm"]["scale"].shape, sorted(state)
    ((1, 1, 1, 3), ['batch_norm/~/mean_ema', 'batch_norm/~/var_ema'])
    """
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis={axis} is out of range for ndim={ndim}; -1 is the last axis")
    ours = read_outgoing(
        params, state, settings, unbiased=False, values_per_feature=values_per_feature
    )
    decay, seen = decay_of(settings, "haiku"), one_count(ours.count, count)
    shape = [1] * ndim
    shape[axis] = len(ours.mean)

    def with_rank(value: np.ndarray) -> Array:
        return jnp.asarray(value.reshape(shape))

    affine = {
        key: with_rank(value)
        for key, value in (("scale", ours.scale), ("offset", ours.bias))
        if value is not None
    }
    statistics = {}
    for key, value in (("mean_ema", ours.mean), ("var_ema", ours.var)):
        hidden = (value * debias(decay, seen, value.dtype)).astype(value.dtype)
        statistics[f"{name}/~/{key}"] = {
            "counter": jnp.asarray(seen, jnp.int32),
            "hidden": with_rank(hidden),
            "average": with_rank(value),
        }
    arguments = {
        "create_scale": params.scale is not None,
        "create_offset": params.bias is not None,
        "decay_rate": decay,
        "eps": read_epsilon(settings["epsilon"]),
    }
    return {name: affine} if affine else {}, statistics, arguments


def check_hidden(
    key: str, entry: Mapping[str, Any], count: int, decay: float, zero_debias: bool
) -> None:
    """Refuse a decay that contradicts hidden and average. Nothing else uses hidden.

    The quotient hidden/average is 1 - decayᵗ, or 1 if not debiased. In float32 it is accurate to
    about 1e-6, and a wrong decay changes it by more, except where it is close to 1; but there the
    decay does not matter.

    Raises:
        CheckpointError: hidden differs from average·(1 - decayᵗ), or either is malformed.

    >>> check_hidden("ema", {"hidden": [0.2], "average": [2.0]}, 1, 0.9, True)
    """
    average = read_statistic(f"{key}.average", entry["average"])
    hidden = require(entry, "hidden", f"state[{key!r}] needs it: check name")
    hidden = read_statistic(f"{key}.hidden", hidden)
    if hidden.shape != average.shape:
        raise checkpoint_error(
            f"{key}.hidden",
            f"has shape {hidden.shape}, but average {average.shape}",
            "both belong to one average: check that they are from the same checkpoint",
        )
    tolerance = max(1e-5, 16 * float(jnp.finfo(average.dtype).eps))
    average, hidden = (
        value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)
        for value in (average, hidden)
    )
    factor = 1 - decay**count if zero_debias and count else 1.0
    off = np.abs(hidden - average * factor) > tolerance * np.abs(average)
    if off.any():
        raise checkpoint_error(
            f"{key}.hidden",
            f"is {hidden[off][0]:.6g} where average is {average[off][0]:.6g} after {count} batches",
            f"decay_rate={decay} with zero_debias={zero_debias} makes it "
            f"{(average * factor)[off][0]:.6g}: pass both as in the layer's constructor",
        )


def squeeze(key: str, value: Any) -> np.ndarray:
    """Reshape [1, ..., features, ..., 1] to [features].

    Raises:
        CheckpointError: more than one axis is longer than 1, or there is none.

    >>> squeeze("scale", np.ones((1, 3, 1))).shape
    (3,)
    """
    array = read_array(key, value)
    if array.ndim == 0 or sum(size != 1 for size in array.shape) > 1:
        raise checkpoint_error(
            key,
            f"has shape {array.shape}",
            "only one axis may be longer than 1; if there are several feature axes, flatten them "
            "into one, in the data too",
        )
    return array.reshape(-1)
