"""The training loop: chunks of steps under `lax.scan`, on data that stays on the device."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

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
from bn_jax.train.chunks import split, steps_per_call
from bn_jax.train.config import TrainConfig
from bn_jax.train.micro_batches import accumulate
from bn_jax.train.placement import ONE_DEVICE, Placement, make_placement
from bn_jax.train.step import (
    Gradients,
    Images,
    Labels,
    TrainState,
    TrainStep,
    count_right,
    in_chunks,
    init_state,
    make_train_step,
    whole_batch,
)

Activity = Literal["compiling", "training", "evaluating"]
Watch = Callable[[Activity, int], None]
"""Is told what begins now, and how many steps have been taken."""


class Evaluation(NamedTuple):
    """What is known after the steps between two evaluations.

    Attributes:
        step: steps taken so far.
        train_loss: mean over the batches since the last evaluation; NaN at step 0.
        test_accuracy: of all test images.
        examples_per_second: of the training since then, without compilation and evaluation.
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
    config: TrainConfig,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    data: Dataset,
    watch: Watch = lambda *_: None,
) -> Iterator[tuple[TrainState, Evaluation]]:
    """Train, and yield the state and its evaluation at step 0 and every so many steps.

    Raises:
        ValueError: a batch is larger than the data, or the devices are not there.
    """
    check_batch_size(config, data)
    watch("compiling", 0)
    placement, examples = make_placement(config.devices), len(data.train_images)
    images = placement.examples(data.train_images)
    labels = placement.examples(data.train_labels.astype(np.int32))
    # A label that no network says, where images are missing to equal shares.
    test = [
        (placement.examples(images), placement.examples(labels, filler=-1))
        for images, labels in in_chunks(data.test_images, data.test_labels)
    ]
    first = data.train_images[: config.batch_size]
    state = placement.everywhere(init_state(model, optimizer, first, config.seed))
    gradients = build_gradients(config, placement)
    train_step = make_train_step(model, optimizer, config.binarization, gradients)
    right = jax.jit(functools.partial(count_right, model, config.binarization))

    def evaluate(state: TrainState) -> float:
        return sum(int(right(state, *chunk)) for chunk in test) / len(data.test_images)

    @functools.cache
    def compiled(steps: int) -> jax.stages.Compiled:
        """A call of some steps, compiled ahead so that its first run is timed like any other."""
        watch("compiling", step)
        sizes = {"steps": steps, "batch_size": config.batch_size, "examples": examples}
        lowered = run_chunk.lower(train_step, state, images, labels, **sizes, placement=placement)
        return lowered.compile()

    step = 0
    yield state, Evaluation(0, float("nan"), evaluate(state), 0.0)
    most = steps_per_call(make_train_step(model, optimizer, config.binarization), state, first)
    while step < config.steps:
        steps = min(config.evaluate_every, config.steps - step)
        losses = seconds = 0.0
        for size in split(steps, most):
            chunk = compiled(size)
            watch("training", step)
            begun = time.perf_counter()
            state, loss = jax.block_until_ready(chunk(state, images, labels))
            seconds += time.perf_counter() - begun
            losses += size * float(loss)
            step += size
        watch("evaluating", step)
        rate = steps * config.batch_size / seconds
        yield state, Evaluation(step, losses / steps, evaluate(state), rate)


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
