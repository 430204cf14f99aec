"""The training loop: chunks of steps under `lax.scan`, on data that stays on the device."""

import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float

from bn_jax.data import Dataset
from bn_jax.train.batches import batch_indices
from bn_jax.train.config import TrainConfig
from bn_jax.train.step import (
    Images,
    Labels,
    TrainState,
    TrainStep,
    accuracy,
    init_state,
    make_train_step,
)


class Evaluation(NamedTuple):
    """What is known after a chunk of steps.

    Attributes:
        step: steps taken so far.
        train_loss: mean over the chunk's batches; NaN at step 0, before the first.
        test_accuracy: of all test images.
        examples_per_second: of the chunk's training, without the evaluation.
    """

    step: int
    train_loss: float
    test_accuracy: float
    examples_per_second: float


@functools.partial(jax.jit, static_argnames=("train_step", "steps", "batch_size"))
def run_chunk(
    train_step: TrainStep,
    state: TrainState,
    images: Images,
    labels: Labels,
    *,
    steps: int,
    batch_size: int,
) -> tuple[TrainState, Float[Array, ""]]:
    """Take some steps; the mean of their losses comes with the new state."""

    def body(state: TrainState, rows: Array) -> tuple[TrainState, Array]:
        return train_step(state, images[rows], labels[rows])

    rows = batch_indices(state.key, state.step, steps, batch_size, len(images))
    # Two steps per iteration: what the loop carries is then copied half as often.
    state, losses = lax.scan(body, state, rows, unroll=2)
    return state, jnp.mean(losses)


def train(
    config: TrainConfig, model: nn.Module, optimizer: optax.GradientTransformation, data: Dataset
) -> Iterator[tuple[TrainState, Evaluation]]:
    """Train, and yield the state and its evaluation before the first step and after each chunk.

    Raises:
        ValueError: a batch is larger than the data.
    """
    check_batch_size(config, data)
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels, jnp.int32)
    test_images, test_labels = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
    state = init_state(model, optimizer, images[: config.batch_size], config.seed)
    train_step = make_train_step(model, optimizer, config.binarization)
    evaluate = jax.jit(functools.partial(accuracy, model, config.binarization))

    @functools.cache
    def compiled(steps: int) -> jax.stages.Compiled:
        """A chunk, compiled ahead so that its first run can be timed like any other."""
        sizes = {"steps": steps, "batch_size": config.batch_size}
        return run_chunk.lower(train_step, state, images, labels, **sizes).compile()

    yield state, Evaluation(0, float("nan"), float(evaluate(state, test_images, test_labels)), 0.0)
    for start in range(0, config.steps, config.evaluate_every):
        steps = min(config.evaluate_every, config.steps - start)
        chunk, begun = compiled(steps), time.perf_counter()
        state, loss = jax.block_until_ready(chunk(state, images, labels))
        seconds = time.perf_counter() - begun
        test_accuracy = float(evaluate(state, test_images, test_labels))
        rate = steps * config.batch_size / seconds
        yield state, Evaluation(start + steps, float(loss), test_accuracy, rate)


def check_batch_size(config: TrainConfig, data: Dataset) -> None:
    """Refuse a batch that the data cannot fill."""
    if config.batch_size > len(data.train_images):
        raise ValueError(
            f"--batch-size {config.batch_size}: must be at most {len(data.train_images)}, the "
            "number of training images"
        )
