"""The training loop: chunks of steps under `lax.scan`, on data that stays on the device."""

import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jaxtyping import Float

from bn_jax.data import Dataset
from bn_jax.train.batches import batch_indices
from bn_jax.train.build import build_average
from bn_jax.train.config import TrainConfig
from bn_jax.train.micro_batches import accumulate
from bn_jax.train.placement import ONE_DEVICE, Placement, make_placement
from bn_jax.train.step import (
    Gradients,
    Images,
    Labels,
    TrainState,
    TrainStep,
    accuracy_by_chunks,
    in_chunks,
    init_state,
    make_train_step,
    whole_batch,
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


@functools.partial(
    jax.jit, static_argnames=("train_step", "steps", "batch_size", "examples", "placement")
)
def run_chunk(
    train_step: TrainStep,
    state: TrainState,
    images: Images,
    labels: Labels,
    *,
    steps: int,
    batch_size: int,
    examples: int | None = None,
    placement: Placement = ONE_DEVICE,
) -> tuple[TrainState, Float[Array, ""]]:
    """Take some steps; the mean of their losses comes with the new state.

    Args:
        train_step: takes one.
        state: to start from.
        images: of all training examples, perhaps with a few more at the end that fill up the mesh.
        labels: theirs.
        steps: how many.
        batch_size: of each.
        examples: how many of the images are some; None for all.
        placement: over which each batch is spread.
    """

    def body(state: TrainState, rows: Array) -> tuple[TrainState, Array]:
        # Replicated first: of rows that lie anywhere, XLA then makes one message, not two.
        batch = placement.replicate((images[rows], labels[rows]))
        state, loss = train_step(state, *placement.spread(batch))
        return placement.replicate(state), loss

    rows = batch_indices(state.key, state.step, steps, batch_size, examples or len(images))
    # Two steps per iteration: what the loop carries is then copied half as often.
    state, losses = lax.scan(body, state, placement.replicate(rows), unroll=2)
    return state, jnp.mean(losses)


def train(
    config: TrainConfig, model: nn.Module, optimizer: optax.GradientTransformation, data: Dataset
) -> Iterator[tuple[TrainState, Evaluation]]:
    """Train, and yield the state and its evaluation before the first step and after each chunk.

    Raises:
        ValueError: a batch is larger than the data, or the devices are not there.
    """
    check_batch_size(config, data)
    placement, examples = make_placement(config.devices), len(data.train_images)
    images = placement.examples(data.train_images)
    labels = placement.examples(data.train_labels.astype(np.int32))
    test_images = placement.examples(in_chunks(data.test_images), axis=1)
    # A label that no image has, where images are missing to equal shares.
    test_labels = placement.examples(in_chunks(data.test_labels.astype(np.int32)), 1, filler=-1)
    first = jnp.asarray(data.train_images[: config.batch_size])
    state = placement.everywhere(init_state(model, optimizer, first, config.seed))
    gradients = build_gradients(config, placement)
    train_step = make_train_step(model, optimizer, config.binarization, gradients)
    count = len(data.test_images)
    score = jax.jit(functools.partial(accuracy_by_chunks, count, model, config.binarization))

    def evaluate(state: TrainState) -> float:
        return float(score(state, test_images, test_labels))

    @functools.cache
    def compiled(steps: int) -> jax.stages.Compiled:
        """A chunk, compiled ahead so that its first run can be timed like any other."""
        sizes = {"steps": steps, "batch_size": config.batch_size, "examples": examples}
        lowered = run_chunk.lower(train_step, state, images, labels, **sizes, placement=placement)
        return lowered.compile()

    yield state, Evaluation(0, float("nan"), evaluate(state), 0.0)
    for start in range(0, config.steps, config.evaluate_every):
        steps = min(config.evaluate_every, config.steps - start)
        chunk, begun = compiled(steps), time.perf_counter()
        state, loss = jax.block_until_ready(chunk(state, images, labels))
        seconds = time.perf_counter() - begun
        rate = steps * config.batch_size / seconds
        yield state, Evaluation(start + steps, float(loss), evaluate(state), rate)


def build_gradients(config: TrainConfig, placement: Placement) -> Gradients:
    """How a step comes to its gradients: in one pass, or in several."""
    if config.micro_batches == 1:
        return whole_batch
    spread = functools.partial(placement.spread, axis=1)
    return accumulate(config.micro_batches, build_average(config), spread)


def check_batch_size(config: TrainConfig, data: Dataset) -> None:
    """Refuse a batch that the data cannot fill."""
    if config.batch_size > len(data.train_images):
        raise ValueError(
            f"--batch-size {config.batch_size}: must be at most {len(data.train_images)}, the "
            "number of training images"
        )
