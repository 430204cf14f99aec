"""The training loop: chunks of steps under `lax.scan`, on data that stays on the device."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int

from bn_jax.data import Dataset
from bn_jax.train.batches import batch_indices, few_class_indices
from bn_jax.train.chunks import next_call, steps_per_call
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.progress import Progress, Take, begin, careful, is_finite, trusting
from bn_jax.train.scoring import make_score
from bn_jax.train.sharding import ONE_DEVICE, Sharding, make_sharding
from bn_jax.train.state import Images, Labels, init_runs
from bn_jax.train.step import TrainStep, make_train_step

Activity = Literal["compiling", "training", "evaluating"]
Watch = Callable[[Activity, int], None]
"""A callback: (what begins now, how many steps have been taken)."""

Sample = Callable[[Array, Array, int, int, int], Int[Array, "steps batch_size"]]
"""Which examples some steps see: of (key, first step, steps, batch size, number of examples)."""


class Evaluation(NamedTuple):
    """What is known of one run after the steps between two evaluations."""

    step: int  # how many have been taken
    train_loss: float  # mean over the batches since the last evaluation; NaN at step 0
    test_accuracy: float  # of all test images
    # Of the training since then, without compilation and evaluation. Each of several seeds at once
    # goes through as many.
    examples_per_second: float
    bad_steps: int = 0  # since then, that were undone, as they were not finite
    diverged: bool = False  # whether too many of them came in a row, so that training has ended
    seed: int = 0
    cell: int = 0  # of a grid, the number of its combination of values

    @property
    def name(self) -> tuple[int, int]:
        """Of which run it is, as in `TrainConfig.names`."""
        return self.cell, self.seed


STATIC = ("train_step", "steps", "batch_size", "examples", "sharding", "take", "sample")


@functools.partial(jax.jit, static_argnames=STATIC)
def run_chunk(
    train_step: TrainStep,
    progress: Progress,
    images: Images,
    labels: Labels,
    *,
    steps: int,
    batch_size: int,
    examples: int | None = None,
    sharding: Sharding = ONE_DEVICE,
    take: Take = trusting,
    sample: Sample = batch_indices,
) -> tuple[Progress, Bool[Array, ""]]:
    """Take some steps in each of the runs, and tell whether all numbers are finite after them.

    Images and labels may be padded to equal shards; `examples` is their number without padding.
    """

    def chunk(progress: Progress, images: Images, labels: Labels) -> tuple[Progress, Array]:
        def body(progress: Progress, rows: Array) -> tuple[Progress, None]:
            # Replicated first: of rows that lie anywhere, XLA then makes one message, not two.
            batch = sharding.replicate((images[rows], labels[rows]))
            return sharding.replicate(take(train_step, progress, *sharding.shard(batch))), None

        state = progress.state
        rows = sample(state.key, state.step, steps, batch_size, examples or len(images))
        # Two steps per iteration: what the loop carries is then copied half as often.
        progress, _ = lax.scan(body, progress, sharding.replicate(rows), unroll=2)
        return progress, is_finite(progress)

    if not progress.state.step.ndim:
        return chunk(progress, images, labels)
    progress, finite = sharding.each_run(chunk, progress, images, labels)
    return progress, finite.all()


def train(
    config: TrainConfig,
    arm: Arm,
    data: Dataset,
    watch: Watch = lambda *_: None,
    resumed: Progress | None = None,
) -> Iterator[tuple[Progress, list[Evaluation]]]:
    """Train, and yield after each compiled call; at evaluations, with one for each run and average.

    The first evaluation is at step 0, the last after the last step, or when all runs have diverged.
    A run that has diverged is evaluated once more, and then left out. Training that is resumed
    goes on after the last evaluation.

    Raises:
        ValueError: the data cannot fill a batch, or the devices are not there.
    """
    check_data(config, data)
    watch("compiling", resumed.step if resumed else 0)
    sharding = make_sharding(config.devices, config.splits_runs)
    images = sharding.examples(data.train_images)
    labels = sharding.examples(data.train_labels.astype(np.int32))
    first, runs = data.train_images[: config.batch_size], len(config.runs)
    train_step = make_train_step(config, arm, sharding)
    score = make_score(config, arm, data, sharding)

    def evaluate(progress: Progress, rate: float) -> list[Evaluation]:
        """Evaluate each run, with each average, that has taken steps since the last time."""
        diverged = progress.diverged(config.max_bad_steps)
        of_runs = progress.state.step, progress.loss, progress.good, progress.bad, diverged
        columns = (np.repeat(np.ravel(column), config.decays).tolist() for column in of_runs)
        scores = score(progress.state).ravel().tolist()
        return [
            Evaluation(step, loss / good if good else np.nan, right, rate, bad, ended, seed, cell)
            for (cell, seed), right, step, loss, good, bad, ended in zip(
                config.names, scores, *columns, strict=True
            )
            if good or bad or not step
        ]

    @functools.cache
    def compiled(steps: int, with_care: bool) -> jax.stages.Compiled:
        """A call of some steps, compiled ahead so that its first run is timed like any other."""
        watch("compiling", progress.step)
        return run_chunk.lower(
            *(train_step, progress, images, labels),
            steps=steps,
            batch_size=config.batch_size,
            examples=len(data.train_images),
            sharding=sharding,
            take=careful(config.max_bad_steps) if with_care else trusting,
            sample=make_sample(config, data),
        ).compile()

    new = begin(init_runs(config, arm, first)) if resumed is None else resumed
    progress: Progress = sharding.everywhere(new)
    if resumed is None:
        yield progress, evaluate(progress, 0.0)
    one = progress.state if runs == 1 else jax.tree.map(lambda leaf: leaf[0], progress.state)
    plain = make_train_step(config.with_values({"micro_batches": 1}), arm)
    most = max(steps_per_call(plain, one, first) // runs, 1)
    # In float16, a step is bad whenever the loss scale has grown too large.
    half = config.precision == "float16"
    taken, seconds = 0, 0.0
    while not progress.is_over(config):
        size = next_call(progress.step, config.steps, config.evaluate_every, most)
        for with_care in (half or progress.was_bad, True):  # again, if not all steps were finite
            chunk = compiled(size, with_care)
            watch("training", progress.step)
            begun = time.perf_counter()
            after, finite = jax.block_until_ready(chunk(progress, images, labels))
            time_taken = time.perf_counter() - begun
            if finite:
                break
        progress, taken, seconds = after, taken + size, seconds + time_taken
        evaluations = []
        if progress.step % config.evaluate_every == 0 or progress.is_over(config):
            watch("evaluating", progress.step)
            evaluations = evaluate(progress, taken * config.batch_size / seconds)
            progress, taken, seconds = progress.reported(), 0, 0.0
        yield progress, evaluations


def make_sample(config: TrainConfig, data: Dataset) -> Sample:
    """Which examples a run's steps see: all, epoch after epoch, or those of a few classes."""
    classes = config.classes_per_batch
    if classes is None:
        return batch_indices

    def sample(key: Array, step: Array, steps: int, batch_size: int, _: int) -> Array:
        rows = few_class_indices(key, step, steps, batch_size, data.train_labels, classes)
        # Class by class in turn, so that groups and micro-batches have the classes of the batch.
        return rows.reshape(steps, classes, -1).swapaxes(1, 2).reshape(steps, batch_size)

    return sample


def check_data(config: TrainConfig, data: Dataset) -> None:
    """Refuse a batch that the data cannot fill."""
    images, classes = len(data.train_images), len(np.unique(data.train_labels))
    fits = config.batch_size <= images
    config.demand("batch_size", fits, f"at most {images}, the number of training images")
    fits = (config.classes_per_batch or 1) <= classes
    config.demand("classes_per_batch", fits, f"at most {classes}, the number of classes")
