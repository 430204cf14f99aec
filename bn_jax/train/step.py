"""One page: the training state, the loss, a training step, an evaluation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, UInt8

Binarization = Literal["threshold", "stochastic", "none"]
Images = UInt8[Array | np.ndarray, "batch height width"]
Labels = Int[Array | np.ndarray, " batch"]


class TrainState(NamedTuple):
    """All that is needed to go on.

    Attributes:
        params: what the optimizer learns.
        batch_stats: running statistics of the normalizations; empty without any.
        opt_state: the optimizer's own.
        step: how many steps have been taken.
        key: of the run; what a step draws depends on it and the step alone.
        values: numbers of the configuration that differ between runs of one program, by name.
    """

    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Array
    values: Mapping[str, Float[Array, ""]] = {}


TrainStep = Callable[[TrainState, Images, Labels], tuple[TrainState, Float[Array, ""]]]
Gradients = Callable[[nn.Module, TrainState, Array, Labels], tuple[Float[Array, ""], Any, Any]]
"""model, state, inputs, labels -> mean loss, new batch_stats, gradients of the params"""


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, images: Images, seed: int
) -> TrainState:
    """The state before the first step; images give the shape only."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, jnp.zeros(images.shape, jnp.float32), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    step = jnp.zeros((), jnp.int32)
    return TrainState(params, batch_stats, optimizer.init(params), step, run_key)


def whole_batch(
    model: nn.Module, state: TrainState, inputs: Float[Array, "batch ..."], labels: Labels
) -> tuple[Float[Array, ""], Any, Any]:
    """Mean loss, new `batch_stats` and gradients, in one pass."""

    def loss_fn(params: Any) -> tuple[Float[Array, ""], Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, labels), updates.get("batch_stats", {})

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return loss, batch_stats, grads


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    binarization: Binarization,
    gradients: Gradients = whole_batch,
) -> TrainStep:
    """A function (state, images, labels) -> (state, mean loss of the batch before the step)."""

    def train_step(
        state: TrainState, images: Images, labels: Labels
    ) -> tuple[TrainState, Float[Array, ""]]:
        key = jax.random.fold_in(state.key, state.step)
        inputs = binarize(images, binarization, key)
        loss, batch_stats, grads = gradients(model, state, inputs, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(params, batch_stats, opt_state, state.step + 1, state.key, state.values)
        return new, loss

    return train_step


def cross_entropy(logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, ""]:
    """The mean loss of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(
    model: nn.Module, binarization: Binarization, state: TrainState, images: Images, labels: Labels
) -> float:
    """The share of images that the network labels rightly, by its running statistics.

    Under a stochastic input, all evaluations see the same draw.
    """
    count = jax.jit(functools.partial(count_right, model, binarization))
    chunks = in_chunks(np.asarray(images), np.asarray(labels))
    return sum(int(count(state, *chunk)) for chunk in chunks) / len(images)


def count_right(
    model: nn.Module, binarization: Binarization, state: TrainState, images: Images, labels: Labels
) -> Int[Array, ""]:
    """How many of the images the network labels rightly."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    inputs = binarize(images, binarization, jax.random.key(0))
    logits: Any = model.apply(variables, inputs, train=False)
    return jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.int32)


def in_chunks(
    images: np.ndarray, labels: np.ndarray, most: int = 1000
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Examples in chunks of one size, as the activations of 10,000 images can be gigabytes.

    Where examples are missing to equal chunks, a label is -1, which no network says.
    """
    count = -(-len(images) // most)
    size = -(-len(images) // count)
    missing = count * size - len(images)
    images = np.pad(images, [(0, missing), (0, 0), (0, 0)])
    labels = np.pad(labels.astype(np.int32), (0, missing), constant_values=-1)
    return list(zip(np.split(images, count), np.split(labels, count), strict=True))


def binarize(images: Images, binarization: Binarization, key: Array) -> Float[Array, "..."]:
    """Grey levels 0..255 as the network's input, 0 or 1 (or between, with "none")."""
    levels = jnp.asarray(images)
    if binarization == "threshold":
        return (levels > 127).astype(jnp.float32)
    grey = levels.astype(jnp.float32) / 255
    if binarization == "stochastic":
        return jax.random.bernoulli(key, grey).astype(jnp.float32)
    return grey
