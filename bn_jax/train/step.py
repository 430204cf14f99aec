"""One page: a pass through the network, in whole or in parts, and a training step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from jax import Array, lax
from jaxtyping import Float

from bn_jax.core.moments import Moments, merge
from bn_jax.core.recalibrate import zeros
from bn_jax.inference.recalibrate_linen import observed
from bn_jax.train.build import build_model, build_optimizer
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.sharding import ONE_DEVICE, Sharding
from bn_jax.train.state import Images, Labels, TrainState, each_average, remember

TrainStep = Callable[[TrainState, Images, Labels], tuple[TrainState, Float[Array, ""]]]


class Pass(NamedTuple):
    """What a batch gives: its loss, what each layer saw (by its path), gradients of params."""

    loss: Float[Array, ""]
    moments: Mapping[tuple[str, ...], Moments]
    grads: Any
    loss_scale: DynamicScale | None


def passes(
    model: nn.Module,
    state: TrainState,
    inputs: Float[Array, "batch ..."],
    labels: Labels,
    parts: int = 1,
    spread: Callable[[Any], Any] = lambda parts: parts,
) -> Pass:
    """A batch through the network, whole or in equal parts, one after the other, to save memory.

    Each part is normalized by its own statistics. Their moments are merged, as if they had been
    measured together; losses and gradients are averaged.
    """

    def one(loss_scale: DynamicScale | None, inputs: Array, labels: Labels) -> Pass:
        def loss_fn(params: Any) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, moments = observed(forward, variables, inputs)
            return cross_entropy(logits, labels), moments

        if loss_scale is None:
            (loss, moments), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        else:
            scaled = loss_scale.value_and_grad(loss_fn, has_aux=True)
            loss_scale, _, (loss, moments), grads = scaled(state.params)
        return Pass(loss, moments, grads, loss_scale)

    def forward(variables: Any, inputs: Array) -> Any:
        return model.apply(variables, inputs, train=True, mutable=["batch_stats"])

    def add(total: Pass, part: tuple[Array, Labels]) -> tuple[Pass, None]:
        new = one(total.loss_scale, *part)
        loss, grads = jax.tree.map(jnp.add, (total.loss, total.grads), (new.loss, new.grads))
        moments = jax.tree.map(
            merge, total.moments, new.moments, is_leaf=lambda node: isinstance(node, Moments)
        )
        return Pass(loss, moments, grads, new.loss_scale), None

    if parts == 1:
        return one(state.loss_scale, inputs, labels)
    batches = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (inputs, labels))
    first = jax.tree.map(lambda a: a[0], batches)
    nothing = zeros(jax.eval_shape(one, state.loss_scale, *first))
    total, _ = lax.scan(add, nothing._replace(loss_scale=state.loss_scale), spread(batches))
    loss, grads = jax.tree.map(lambda sum: sum / parts, (total.loss, total.grads))
    return total._replace(loss=loss, grads=grads)


def make_train_step(
    config: TrainConfig,
    arm: Arm,
    sharding: Sharding = ONE_DEVICE,
    passes: Callable[..., Pass] = passes,
) -> TrainStep:
    """A function (state, images, labels) -> (state, mean loss of the batch before the step)."""

    def train_step(
        state: TrainState, images: Images, labels: Labels
    ) -> tuple[TrainState, Float[Array, ""]]:
        own = config.with_values(state.values)
        model, optimizer = build_model(own, arm), build_optimizer(own)
        inputs = binarize(images, own.binarization, jax.random.fold_in(state.key, state.step))
        split = functools.partial(sharding.shard, axis=1)
        loss, moments, grads, loss_scale = passes(
            model, state, inputs, labels, own.micro_batches, split
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = state._replace(
            params=optax.apply_updates(state.params, updates),
            batch_stats=remember(own, state.batch_stats, moments),
            opt_state=opt_state,
            step=state.step + 1,
            loss_scale=loss_scale,
        )
        return new, loss

    return each_average(config, train_step, returns_state=True)


def cross_entropy(logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, ""]:
    """The mean loss of a batch, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def binarize(images: Images, binarization: str, key: Array) -> Float[Array, "..."]:
    """Grey levels 0..255 as the network's input, 0 or 1 (or between, with "none")."""
    levels = jnp.asarray(images)
    if binarization == "threshold":
        return (levels > 127).astype(jnp.float32)
    grey = levels.astype(jnp.float32) / 255
    if binarization == "stochastic":
        return jax.random.bernoulli(key, grey).astype(jnp.float32)
    return grey
