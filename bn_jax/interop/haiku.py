"""haiku.BatchNorm: its entries of params and state, in and out.

Differs from ours in the words: `offset` is bias, `decay_rate` our decay, and the running statistics
are the `average` of two ExponentialMovingAverages, `mean_ema` and `var_ema`. Each also keeps a
`counter` and a `hidden` that starts at zero, with average = hidden/(1 - decayᵗ): that is our
`DebiasedEma`, which needs no hidden. Values have the data's rank, such as [1, 1, 1, features]; the
running variance is biased.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.core.averages import BatchNormState, DebiasedEma, Ema
from bn_jax.core.normalize import BatchNormParams
from bn_jax.interop.checks import (
    read_array,
    read_mapping,
    read_statistic,
    refusal,
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
    """One BatchNorm of the params and state that a transformed function has.

    Args:
        params: module name -> {scale, offset}, of the whole model.
        state: module name -> {counter, hidden, average}, likewise.
        name: of the BatchNorm, e.g. "res_net50/~/initial_batchnorm".
        decay_rate: as the layer was made.
        eps: likewise.
        zero_debias: as the averages were made; haiku.BatchNorm's are debiased. False is `Ema`.
        values_per_feature: m. If given, the variance gets m/(m - 1) and settings say unbiased, the
            core's convention; None copies haiku's own. See `bn_jax.interop.settings`.

    Returns:
        (params, state, settings): scale or bias are None where scale or offset are absent; all of
        shape [features]. The running statistics are haiku's averages, to the bit.

    Raises:
        CheckpointError: an entry is missing, extra, wrongly shaped, not finite, or no array; the
            variance is negative; hidden and average do not fit decay_rate.
        ValueError: decay_rate is outside of [0, 1], eps is negative, or values_per_feature not
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
            entry, ("counter", "hidden", "average"), f"state[{ema!r}] is no average: check name"
        )
        keys[field] = f"{ema}.average"
        found[field] = require(entry, "average", f"state[{ema!r}] needs it")
        counter = f"{ema}.counter"
        seen = require(entry, "counter", f"state[{ema!r}] needs it")
        counters[field] = read_one_count(counter, seen)
        check_hidden(ema, entry, counters[field], decay_rate, zero_debias)
    if counters["mean"] != counters["var"]:
        raise refusal(
            f"{name}/~/var_ema.counter",
            f"is {counters['var']}, that of mean_ema {counters['mean']}",
            "both are updated together: are they of one checkpoint?",
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
    """The entries of one BatchNorm in params and state, and the arguments to make it with.

    haiku debiases whatever the settings' average: an `Ema` and its `count` become a debiased
    average of the same statistics, which is the same in evaluation, and once some 1/(1 - decay)
    batches are seen, in training too.

    Args:
        params: as the core has them, of shape [features].
        state: likewise.
        settings: as `from_haiku` and the like return them, or a dict of average, epsilon, unbiased.
        name: of the BatchNorm.
        ndim: of the data it will see, whose rank its values have: 2 for [batch, features].
        axis: of the features in these data; 1 for data_format="channels_first".
        count: of batches, where the state's differs between features, or is 0 although there are
            statistics, which then count as long seen (`bn_jax.core.averages.LOADED`).
        values_per_feature: m. If settings are unbiased, the variance gets (m - 1)/m, by which haiku
            goes on; None copies it. See `bn_jax.interop.settings` on when it matters.

    Returns:
        (params, state, arguments): merge the first two into those of the model; arguments are
        create_scale, create_offset, decay_rate, eps. `average` and `counter` are the state's own;
        `hidden` is their product average·(1 - decayᵗ), rounded once.

    Raises:
        CheckpointError: a value is malformed; haiku has no such average; counts differ.
        ValueError: values_per_feature is not above 1; axis is not one of ndim.

    >>> import bn_jax as bn
    >>> settings = {"average": bn.DebiasedEma(0.99), "epsilon": 1e-5, "unbiased": False}
    >>> params, state, arguments = to_haiku(*bn.init(3), settings, ndim=4)
    >>> params["batch_norm"]["scale"].shape, sorted(state)
    ((1, 1, 1, 3), ['batch_norm/~/mean_ema', 'batch_norm/~/var_ema'])
    """
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis={axis} is not one of data of ndim={ndim}; -1 is the last")
    ours = read_outgoing(
        params, state, settings, unbiased=False, values_per_feature=values_per_feature
    )
    decay, seen = decay_of(settings, "haiku"), one_count(ours.count, count)
    shape = [1] * ndim
    shape[axis] = len(ours.mean)

    def spread(value: np.ndarray) -> Array:
        return jnp.asarray(value.reshape(shape))

    affine = {
        key: spread(value)
        for key, value in (("scale", ours.scale), ("offset", ours.bias))
        if value is not None
    }
    statistics = {}
    for key, value in (("mean_ema", ours.mean), ("var_ema", ours.var)):
        hidden = (value * debias(decay, seen, value.dtype)).astype(value.dtype)
        statistics[f"{name}/~/{key}"] = {
            "counter": jnp.asarray(seen, jnp.int32),
            "hidden": spread(hidden),
            "average": spread(value),
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
    """Refuse a decay that hidden and average contradict; hidden is not used otherwise.

    Their quotient is 1 - decayᵗ, or 1 if not debiased. float32 holds that to some 1e-6; of a wrong
    decay it differs by more as long as it is not close to 1, where the decay does not matter.

    Raises:
        CheckpointError: average·(1 - decayᵗ) is not hidden, or either is malformed.

    >>> check_hidden("ema", {"hidden": [0.2], "average": [2.0]}, 1, 0.9, True)
    """
    average = read_statistic(f"{key}.average", entry["average"])
    hidden = require(entry, "hidden", f"state[{key!r}] needs it: is it another module's?")
    hidden = read_statistic(f"{key}.hidden", hidden)
    if hidden.shape != average.shape:
        raise refusal(
            f"{key}.hidden",
            f"has shape {hidden.shape}, but average {average.shape}",
            "both are of one average: are they of one checkpoint?",
        )
    tolerance = max(1e-5, 16 * float(jnp.finfo(average.dtype).eps))
    average, hidden = (
        value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)
        for value in (average, hidden)
    )
    factor = 1 - decay**count if zero_debias and count else 1.0
    off = np.abs(hidden - average * factor) > tolerance * np.abs(average)
    if off.any():
        raise refusal(
            f"{key}.hidden",
            f"is {hidden[off][0]:.6g} where average is {average[off][0]:.6g} after {count} batches",
            f"decay_rate={decay} with zero_debias={zero_debias} makes it "
            f"{(average * factor)[off][0]:.6g}: give both as the layer was made",
        )


def squeeze(key: str, value: Any) -> np.ndarray:
    """[1, ..., features, ..., 1] -> [features].

    Raises:
        CheckpointError: more than one axis is longer than 1, or there is none.

    >>> squeeze("scale", np.ones((1, 3, 1))).shape
    (3,)
    """
    array = read_array(key, value)
    if array.ndim == 0 or sum(size != 1 for size in array.shape) > 1:
        raise refusal(
            key,
            f"has shape {array.shape}",
            "one axis holds the features, all others are 1; for several feature axes, flatten "
            "those of data and values into one",
        )
    return array.reshape(-1)
