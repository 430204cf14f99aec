"""equinox.nn.BatchNorm: the layer and its State, in and out.

Differs from ours in that the running statistics live in an `equinox.nn.State`, where the layer's
indices find them, and that there are two `mode`s. `momentum` is our decay; the running variance is
biased.

mode="batch" keeps a sum that starts at mean 0 and variance 1, and divides both by 1 - decayᵗ in
evaluation. That is `DebiasedEma` for the mean. For the variance it leaves
decayᵗ/(1 - decayᵗ) of the initial one in: 103 for a true 4 after one batch of decay 0.99, and 4.6
after 100. Converting keeps it, as equinox evaluates, and `DebiasedEma` goes on to forget it just as
equinox does; `mend=True` takes it out.

mode="ema" takes the first batch as it is and is not debiased: `FirstThenEma`. It also *trains* by
the running statistics, which no batch norm of the paper does, and ours does not: evaluation is the
same, training is not.
"""

import dataclasses
import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bn_jax.core.averages import LOADED, BatchNormState, DebiasedEma, check_decay
from bn_jax.core.normalize import BatchNormParams
from bn_jax.interop.checks import read_array, refusal
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
    """The first batch as it is, then an exponential moving average from there.

    Args:
        decay: in [0, 1].

    Raises:
        ValueError: decay is outside of [0, 1].

    >>> [float(FirstThenEma(0.5)(count)) for count in (0, 1, 2)]
    [0.0, 0.5, 0.5]
    """

    decay: float

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def __call__(self, count: ArrayLike) -> Array:
        """The weight kept of the past after count batches."""
        return jnp.where(jnp.asarray(count) > 0, jnp.asarray(self.decay, jnp.result_type(float)), 0)


def from_equinox(
    layer: Any,
    state: Any,
    *,
    count: int = LOADED,
    mend: bool = False,
    values_per_feature: float | None = None,
) -> tuple[BatchNormParams, BatchNormState, Settings]:
    """One BatchNorm of an equinox model.

    Args:
        layer: the `equinox.nn.BatchNorm`, e.g. model.layers[1].
        state: the `equinox.nn.State` of the model.
        count: of batches with mode="ema", which only knows whether there was any; no matter to
            `FirstThenEma` as long as it is not 0. Other averages weigh the past by it.
        mend: of mode="batch", take out what its debiasing leaves of the initial variance. After
            few batches this subtracts nearly equal numbers: a variance v is good to about
            1e-7/(v·(1 - decayᵗ)) of itself.
        values_per_feature: m. If given, the variance gets m/(m - 1) and settings say unbiased, the
            core's convention; None copies equinox' own. See `bn_jax.interop.settings`.

    Returns:
        (params, state, settings): scale and bias are None with channelwise_affine=False; mean and
        variance are what equinox evaluates by.

    Raises:
        CheckpointError: layer or state is of another kind; a value is wrongly shaped, not finite,
            or no array; the variance is negative.
        ValueError: values_per_feature is not above 1.

    >>> from types import SimpleNamespace
    >>> layer = SimpleNamespace(mode="batch", momentum=0.5, eps=1e-5, weight=None, bias=None,
    ...     batch_counter="counter", batch_state_index="hidden")
    >>> hidden = (jnp.array([1.0]), jnp.array([0.5 * 1 + 0.5 * 4]))  # one batch of N(2, 4)
    >>> state = {"counter": 1, "hidden": hidden}
    >>> [from_equinox(layer, state, mend=mend)[1].var.tolist() for mend in (False, True)]
    [[5.0], [4.0]]
    """
    mode = kind(layer)
    decay = float(layer.momentum)
    if mode == "batch":
        seen = read_one_count("batch_counter", stored(state, layer, "batch_counter"))
        hidden = stored(state, layer, "batch_state_index")
        hidden_mean, hidden_var = (
            read_array(f"batch_state_index[{i}]", value) for i, value in enumerate(pair(hidden))
        )
        # Divided by JAX, as equinox does: XLA multiplies by the inverse, numpy would not.
        mean, var = (
            jnp.asarray(value) / jnp.asarray(scale(decay, seen, value.dtype))
            for value in (hidden_mean, hidden_var)
        )
        if mend and seen:
            left = decay**seen
            var = np.maximum((hidden_var.astype(np.float64) - left) / (1 - left), 0)
            var = var.astype(hidden_var.dtype)
        average = DebiasedEma(decay)
    else:
        fresh = bool(read_first(stored(state, layer, "ema_first_time_index")))
        mean, var = pair(stored(state, layer, "ema_state_index"))
        seen = 0 if fresh else count
        if fresh:  # equinox' buffers are empty memory until then
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
    """A BatchNorm and State with our values in place of theirs. Imports equinox.

    Args:
        params: as the core has them, of shape [features].
        state: likewise.
        settings: as `from_equinox` and the like return them, or a dict of average, epsilon,
            unbiased.
        layer: an `equinox.nn.BatchNorm` made for them: momentum, eps, size and channelwise_affine
            must fit. equinox has both of weight and bias or neither: None becomes 1 or 0.
        layer_state: the `equinox.nn.State` of the model; used up, as by a call of the model.
        count: of batches, where the state's differs between features, or is 0 although there are
            statistics, which then count as long seen (`bn_jax.core.averages.LOADED`).
        values_per_feature: m. If settings are unbiased, the variance gets (m - 1)/m, by which
            equinox goes on; None copies it. See `bn_jax.interop.settings` on when it matters.

    Returns:
        (layer, layer_state), new ones. With mode="batch" what is stored is mean and variance times
        1 - decayᵗ, rounded once.

    Raises:
        CheckpointError: a value is malformed; the layer is made for others; equinox has no such
            average; counts differ.
        ValueError: values_per_feature is not above 1.
    """
    eqx: Any = importlib.import_module("equinox")
    mode = kind(layer)
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
            raise refusal(
                f"layer.{name}",
                f"is {getattr(layer, name)}, but should be {value}",
                f"make the layer by equinox.nn.BatchNorm(..., {name}={value})",
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
            jnp.asarray(value * scale(wanted["momentum"], seen, value.dtype))
            for value in (ours.mean, ours.var)
        )
        layer_state = layer_state.set(layer.batch_state_index, hidden)
        return layer, layer_state.set(layer.batch_counter, jnp.asarray(seen))
    layer_state = layer_state.set(
        layer.ema_state_index, (jnp.asarray(ours.mean), jnp.asarray(ours.var))
    )
    return layer, layer_state.set(layer.ema_first_time_index, jnp.asarray(seen == 0))


def kind(layer: Any) -> str:
    """The mode of an equinox BatchNorm.

    Raises:
        CheckpointError: layer is something else.

    >>> kind("a name")
    Traceback (most recent call last):
    bn_jax.interop.checks.CheckpointError: layer: is str, no equinox.nn.BatchNorm; ...
    """
    mode = getattr(layer, "mode", None)
    if mode not in ("batch", "ema") or not hasattr(layer, "momentum"):
        raise refusal(
            "layer",
            f"is {type(layer).__name__}, no equinox.nn.BatchNorm",
            "pass the layer itself, e.g. model.layers[1], and the model's State",
        )
    return mode


def scale(decay: float, count: int, dtype: Any) -> np.ndarray:
    """What mode="batch" divides by in evaluation: 1 - decayᵗ, and 1 before the first batch.

    >>> float(scale(0.5, 2, np.float32)), float(scale(0.5, 0, np.float32))
    (0.75, 1.0)
    """
    return debias(decay, count, dtype) if count else np.ones((), dtype)


def stored(state: Any, layer: Any, name: str) -> Any:
    """What a State holds for an index of the layer.

    Raises:
        CheckpointError: it holds nothing, as a State of another model.
    """
    index = getattr(layer, name)
    try:
        value = state.get(index)
    except (AttributeError, KeyError, ValueError) as error:
        value, cause = None, error
    else:
        cause = None
    if value is None:
        raise refusal(
            f"layer.{name}",
            f"is not in the given state of type {type(state).__name__}",
            "pass the equinox.nn.State that belongs to this model, as make_with_state returned it "
            "or training left it",
        ) from cause
    return value


def pair(value: Any) -> tuple[Any, Any]:
    """(mean, var), as a State holds them.

    Raises:
        CheckpointError: it is no pair.

    >>> pair((1, 2))
    (1, 2)
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise refusal(
            "state", f"holds {type(value).__name__}, no pair", "is it a BatchNorm's (mean, var)?"
        )
    return value[0], value[1]


def read_first(value: Any) -> np.ndarray:
    """Whether a layer of mode="ema" still waits for its first batch.

    Raises:
        CheckpointError: it is no single bool.

    >>> bool(read_first(np.array(True)))
    True
    """
    array = np.asarray(value)
    if array.dtype != bool or array.ndim:
        raise refusal(
            "ema_first_time_index", f"is {value!r}", "one bool belongs here: is it a BatchNorm's?"
        )
    return array
