"""What a run carries from step to step; its running statistics, of which it can carry several.

Training normalizes by the batch and never reads the running statistics. So one run can carry any
number of moving averages, on a leading axis of `batch_stats`, at no cost but theirs. (With renorm,
training does read them, and each average needs a run of its own.)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale
from flax.traverse_util import unflatten_dict
from jax import Array
from jaxtyping import Float, Int, UInt8

from bn_jax.core import renorm
from bn_jax.core.moments import Moments
from bn_jax.core.state import BatchNormState, advance
from bn_jax.train.build import build_average, build_model, build_optimizer
from bn_jax.train.config import Arm, TrainConfig

Images = UInt8[Array | np.ndarray, "batch height width"]
Labels = Int[Array | np.ndarray, " batch"]

LOSS_SCALE, LEAST_SCALE = 2.0**16, 1.0
"""To begin with in float16, and at least: a scale that makes a step overflow is halved."""


class TrainState(NamedTuple):
    """All that is needed to go on."""

    params: Any  # what the optimizer learns
    batch_stats: Any  # running statistics; with several decays, on a leading axis of these
    opt_state: optax.OptState
    step: Int[Array, ""]  # how many have been taken
    key: Array  # of the run; what a step draws depends on it and the step alone
    loss_scale: DynamicScale | None = None  # what the loss is multiplied by in float16
    values: Mapping[str, Float[Array, "..."]] = {}  # settings that differ within the program


def init_state(config: TrainConfig, arm: Arm, images: Images) -> TrainState:
    """The state before the first step; images give the shape only."""
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    blank = jnp.zeros(images.shape, jnp.float32)
    variables = build_model(config, arm).init(init_key, blank, train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    scale = None
    if config.precision == "float16":
        start = {"fin_steps": jnp.int32(0), "scale": jnp.float32(LOSS_SCALE)}
        scale = DynamicScale(**start, minimum_scale=LEAST_SCALE)
    opt_state = build_optimizer(config).init(params)
    return TrainState(params, batch_stats, opt_state, jnp.int32(0), run_key, scale)


def remember(config: TrainConfig, batch_stats: Any, moments: Mapping[Any, Moments]) -> Any:
    """The running statistics of all layers after one more batch, with its moments by layer."""
    average = build_average(config)

    def one(layer: Mapping[str, Any], moments: Moments) -> Mapping[str, Any]:
        state = BatchNormState(**layer)
        if config.renorm:
            return renorm.remember(state, moments, average, config.epsilon)._asdict()
        return advance(state, moments, average, unbiased=True)._asdict()

    seen = unflatten_dict(dict(moments))
    return jax.tree.map(one, batch_stats, seen, is_leaf=lambda node: "var" in node)


def each_average(
    config: TrainConfig, function: Callable[..., Any], returns_state: bool = False
) -> Callable[..., Any]:
    """A function of (state, ...) for each of the averages that a state carries.

    Each average has a result of its own. If that is (state, ...), only its averages differ; the
    rest is returned once.
    """
    if config.decays == 1:
        return function
    values: Any = {name: 0 if name == "decay" else None for name in config.axes}
    axes: Any = TrainState._make([None] * len(TrainState._fields))
    axes = axes._replace(batch_stats=0, values=values)
    out = (axes, None) if returns_state else 0

    def for_each(state: TrainState, *others: Any) -> Any:
        return jax.vmap(lambda state: function(state, *others), (axes,), out)(state)

    return for_each


def members(state: TrainState, config: TrainConfig) -> list[TrainState]:
    """The states of the runs of one program, one by one."""
    if (count := len(config.runs)) == 1:
        return [state]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(count)]


def init_runs(config: TrainConfig, arm: Arm, images: Images) -> TrainState:
    """All runs of a configuration before the first step; images give the shape only."""

    def init_run(run: TrainConfig) -> TrainState:
        numbers = vars(run) | run.limits
        values = {name: jnp.asarray(numbers[name], jnp.float32) for name in config.axes}
        state = init_state(run.with_values(values), arm, images)
        if (averages := config.decays) > 1:
            values["decay"] = jnp.asarray(config.axes["decay"], jnp.float32)
            each = jax.tree.map(lambda leaf: jnp.stack([leaf] * averages), state.batch_stats)
            state = state._replace(batch_stats=each)
        return state._replace(values=values)

    runs = [init_run(run) for run in config.runs]
    return runs[0] if len(runs) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
