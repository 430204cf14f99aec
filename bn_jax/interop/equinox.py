"""Converts equinox.nn.BatchNorm, from and to the layer and its State.

The running statistics are in an `equinox.nn.State`, at the layer's indices. `momentum` is our
decay, and the running variance is biased. There are two modes.

mode="batch" keeps a sum that starts at mean 0 and variance 1, and divides both by 1 - decayᵗ in
evaluation. For the mean that is `DebiasedEma`. In the variance, decayᵗ/(1 - decayᵗ) of the initial
variance remains: with decay 0.99 and a true variance of 4, it is 103 after one batch and 4.6 after
100. Converting keeps this, because equinox evaluates by it, and `DebiasedEma` then forgets it as
equinox does. `remove_initial_variance=True` removes it.

mode="ema" starts with the statistics of the first batch and does not debias: `FirstThenEma`. It
also normalizes by the running statistics in *training*, unlike the paper and our layers. So
evaluation is the same, but training is not.
"""

import dataclasses
import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bn_jax.core.averages import DebiasedEma
from bn_jax.core.checks import check_decay
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import LOADED, BatchNormState
from bn_jax.interop.checks import checkpoint_error, read_array
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


@dataclasses.dataclass(frozen=True)
class FirstThenEma:
    """An exponential moving average that starts with the first batch.

    Args:
        decay: in [0, 1].

    Raises:
        ValueError: decay is outside [0, 1].

    >>> [float(FirstThenEma(0.5)(count)) for count in (0, 1, 2)]
    [0.0, 0.5, 0.5]
    """

    decay: float

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def __call__(self, count: ArrayLike) -> Array:
        """The weight of the past after count batches."""
        return jnp.where(jnp.asarray(count) > 0, jnp.asarray(self.decay, jnp.result_type(float)), 0)


def from_equinox(
    layer: Any,
    state: Any,
    *,
    count: int = LOADED,
    remove_initial_variance: bool = False,
    values_per_feature: float | None = None,
) -> tuple[BatchNormParams, BatchNormState, Settings]:
    """Convert one BatchNorm of an equinox model.

    Args:
        layer: the `equinox.nn.BatchNorm`, e.g. model.layers[1].
        state: the `equinox.nn.State` of the model.
        count: the number of batches seen, for mode="ema", which only keeps whether there was one.
            `FirstThenEma` needs it to be above 0; other averages weigh the past by it.
        remove_initial_variance: with mode="batch", subtract what debiasing leaves of the initial
            variance. After few batches, nearly equal numbers are subtracted: the relative error of
            a variance v is then about 1e-7/(v·(1 - decayᵗ)).
        values_per_feature: m, to convert the variance to the core's unbiased one by m/(m - 1).
            None copies equinox' biased one. See `bn_jax.interop.settings`.

    Returns:
        (params, state, settings). scale and bias are None with channelwise_affine=False. Mean and
        variance are those that equinox evaluates by.

    Raises:
        CheckpointError: layer or state has another type; a value has the wrong shape, is not
            finite, or not an array; the variance is negative.
        ValueError: values_per_feature is not above 1.

    >>> from types import SimpleNamespace
    >>> layer = SimpleNamespace(mode="batch", momentum=0.5, eps=1e-5, weight=None, bias=None,
    ...     batch_counter="counter", batch_state_index="hidden")
    >>> hidden = (jnp.array([1.0]), jnp.array([0.5 * 1 + 0.5 * 4]))  # one batch of N(2, 4)
    >>> state = {"counter": 1, "hidden": hidden}
    >>> from_equinox(layer, state)[1].var.tolist()
    [5.0]
    >>> from_equinox(layer, state, remove_initial_variance=True)[1].var.tolist()
    [4.0]
    """
    mode = read_mode(layer)
    decay = float(layer.momentum)
    if mode == "batch":
        seen = read_one_count("batch_counter", state_entry(state, layer, "batch_counter"))
        hidden = state_entry(state, layer, "batch_state_index")
        hidden_mean, hidden_var = (
            read_array(f"batch_state_index[{i}]", value)
            for i, value in enumerate(read_pair(hidden))
        )
        # JAX divides, as in equinox: XLA multiplies by the reciprocal, and numpy would not.
        mean, var = (
            jnp.asarray(value) / jnp.asarray(debias_factor(decay, seen, value.dtype))
            for value in (hidden_mean, hidden_var)
        )
        if remove_initial_variance and seen:
            left = decay**seen
            var = np.maximum((hidden_var.astype(np.float64) - left) / (1 - left), 0)
            var = var.astype(hidden_var.dtype)
        average = DebiasedEma(decay)
    else:
        fresh = bool(read_first(state_entry(state, layer, "ema_first_time_index")))
        mean, var = read_pair(state_entry(state, layer, "ema_state_index"))
        seen = 0 if fresh else count
        if fresh:  # until the first batch, equinox' buffers are uninitialized
            mean, var = np.zeros_like(mean), np.ones_like(var)
        average = FirstThenEma(decay)
    names = {"scale": "weight", "mean": f"mean of mode={mode!r}", "var": f"var of mode={mode!r}"}
    values = {"scale": layer.weight, "bias": layer.bias, "mean": mean, "var": var}
    params, memory = read_layer(values, names, count=seen)
    memory, settings = as_settings(memory, average, layer.eps, values_per_feature)
    return params, memory, settings


def to_equinox(
    params: BatchNormParams,
    state: BatchNormState,
    settings: Settings,
    layer: Any,
    layer_state: Any,
    *,
    count: int | None = None,
    values_per_feature: float | None = None,
) -> tuple[Any, Any]:
    """Put our values into an equinox BatchNorm and its State. Imports equinox.

    Args:
        params: our parameters, of shape [features].
        state: our state.
        settings: average, epsilon and unbiased, as the `from_…` functions return them.
        layer: an `equinox.nn.BatchNorm` whose momentum, eps, size and channelwise_affine fit.
            equinox has weight and bias or neither, so a None among ours becomes 1 or 0.
        layer_state: the `equinox.nn.State` of the model; it cannot be used again.
        count: the number of batches, if it differs between the features of the state. If it is 0
            although the statistics are not those of a new layer, it becomes
            `bn_jax.core.state.LOADED`.
        values_per_feature: m, to convert an unbiased variance to equinox' biased one by (m - 1)/m.
            None copies it. `bn_jax.interop.settings` explains when this matters.

    Returns:
        (layer, layer_state), both new. With mode="batch", the stored values are mean and variance
        times 1 - decayᵗ, rounded once.

    Raises:
        CheckpointError: a value is malformed; the layer's settings do not fit; equinox does not
            have this average; counts differ.
        ValueError: values_per_feature is not above 1.
    """
    eqx: Any = importlib.import_module("equinox")
    mode = read_mode(layer)
    ours = read_outgoing(
        params, state, settings, unbiased=False, values_per_feature=values_per_feature
    )
    affine = params.scale is not None or params.bias is not None
    wanted = {
        "momentum": decay_of(settings, "equinox"),
        "eps": read_epsilon(settings["epsilon"]),
        "input_size": len(ours.mean),
        "channelwise_affine": affine,
    }
    for name, value in wanted.items():
        if getattr(layer, name) != value:
            raise checkpoint_error(
                f"layer.{name}",
                f"is {getattr(layer, name)}, but should be {value}",
                f"make the layer with equinox.nn.BatchNorm(..., {name}={value})",
            )
    seen = one_count(ours.count, count)
    if affine:
        weight = np.ones_like(ours.var) if ours.scale is None else ours.scale
        bias = np.zeros_like(ours.mean) if ours.bias is None else ours.bias
        layer = eqx.tree_at(
            lambda layer: (layer.weight, layer.bias),
            layer,
            (jnp.asarray(weight), jnp.asarray(bias)),
        )
    if mode == "batch":
        hidden = tuple(
            jnp.asarray(value * debias_factor(wanted["momentum"], seen, value.dtype))
            for value in (ours.mean, ours.var)
        )
        layer_state = layer_state.set(layer.batch_state_index, hidden)
        return layer, layer_state.set(layer.batch_counter, jnp.asarray(seen))
    layer_state = layer_state.set(
        layer.ema_state_index, (jnp.asarray(ours.mean), jnp.asarray(ours.var))
    )
    return layer, layer_state.set(layer.ema_first_time_index, jnp.asarray(seen == 0))


def read_mode(layer: Any) -> str:
    """The mode of an equinox BatchNorm.

    Raises:
        CheckpointError: layer is something else.

    >>> read_mode("a name")
    Traceback (most recent call last):
    bn_jax.interop.checks.CheckpointError: layer: is str, not an equinox.nn.BatchNorm; ...
    """
    mode = getattr(layer, "mode", None)
    if mode not in ("batch", "ema") or not hasattr(layer, "momentum"):
        raise checkpoint_error(
            "layer",
            f"is {type(layer).__name__}, not an equinox.nn.BatchNorm",
            "pass the layer itself, e.g. model.layers[1], and the model's State",
        )
    return mode


def debias_factor(decay: float, count: int, dtype: Any) -> np.ndarray:
    """The divisor of mode="batch" in evaluation: 1 - decayᵗ, or 1 before the first batch.

    >>> float(debias_factor(0.5, 2, np.float32)), float(debias_factor(0.5, 0, np.float32))
    (0.75, 1.0)
    """
    return debias(decay, count, dtype) if count else np.ones((), dtype)


def state_entry(state: Any, layer: Any, name: str) -> Any:
    """The value in a State at one of the layer's indices.

    Raises:
        CheckpointError: there is none, because the State belongs to another model.
    """
    index = getattr(layer, name)
    try:
        value = state.get(index)
    except (AttributeError, KeyError, ValueError) as error:
        value, cause = None, error
    else:
        cause = None
    if value is None:
        raise checkpoint_error(
            f"layer.{name}",
            f"is not in the given state of type {type(state).__name__}",
            "pass the equinox.nn.State that belongs to this model, as make_with_state returned it "
            "or training left it",
        ) from cause
    return value


def read_pair(value: Any) -> tuple[Any, Any]:
    """The pair (mean, var) in a State.

    Raises:
        CheckpointError: it is not a pair.

    >>> read_pair((1, 2))
    (1, 2)
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise checkpoint_error(
            "state", f"holds {type(value).__name__}", "a pair (mean, var) belongs here"
        )
    return value[0], value[1]


def read_first(value: Any) -> np.ndarray:
    """Whether a layer of mode="ema" still waits for its first batch.

    Raises:
        CheckpointError: it is not a single bool.

    >>> bool(read_first(np.array(True)))
    True
    """
    array = np.asarray(value)
    if array.dtype != bool or array.ndim:
        raise checkpoint_error(
            "ema_first_time_index", f"is {value!r}", "a single bool belongs here"
        )
    return array
