"""The training loop: chunks of steps under `lax.scan`, on data that stays on the device."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jaxtyping import Bool

from bn_jax.data import Dataset
from bn_jax.train.batches import batch_indices
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


class Evaluation(NamedTuple):
    """What is known of one run after the steps between two evaluations.

    Attributes:
        step: steps taken so far.
        train_loss: mean over the batches since the last evaluation; NaN at step 0.
        test_accuracy: of all test images.
        examples_per_second: of the training since then, without compilation and evaluation; each
            of several seeds at once goes through as many.
        bad_steps: steps since then that were undone, as they were not finite.
        diverged: whether too many of them came in a row, so that training has ended.
        seed: of the run.
        cell: of a grid, the number of its combination of values.
    """

    step: int
    train_loss: float
    test_accuracy: float
    examples_per_second: float
    bad_steps: int = 0
    diverged: bool = False
    seed: int = 0
    cell: int = 0

    @property
    def name(self) -> tuple[int, int]:
        """Of which run it is, as in `TrainConfig.names`."""
        return self.cell, self.seed


@functools.partial(
    jax.jit, static_argnames=("train_step", "steps", "batch_size", "examples", "sharding", "take")
)
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
) -> tuple[Progress, Bool[Array, ""]]:
    """Take some steps; whether all came out finite comes with the new progress.

    Args:
        train_step: takes one.
        progress: to start from; each of several runs takes its own steps.
        images: of all training examples, perhaps padded to equal shards.
        labels: theirs.
        steps: how many.
        batch_size: of each.
        examples: how many of the images are some; None for all.
        sharding: over which each batch is spread.
        take: how to take a step, and what to do if it is not finite.
    """

    def chunk(progress: Progress, images: Images, labels: Labels) -> tuple[Progress, Array]:
        def body(progress: Progress, rows: Array) -> tuple[Progress, None]:
            # Replicated first: of rows that lie anywhere, XLA then makes one message, not two.
            batch = sharding.replicate((images[rows], labels[rows]))
            return sharding.replicate(take(train_step, progress, *sharding.shard(batch))), None

        state = progress.state
        rows = batch_indices(state.key, state.step, steps, batch_size, examples or len(images))
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
    A run that has diverged is evaluated once more, and then left out.

    Args:
        config: of the run.
        arm: of it.
        data: to train and to test on.
        watch: a callback for what is done.
        resumed: to go on from; None starts.

    Raises:
        ValueError: a batch is larger than the data, or the devices are not there.
    """
    check_batch_size(config, data)
    step = resumed.step if resumed else 0
    watch("compiling", step)
    sharding, examples = make_sharding(config.devices, config.splits_runs), len(data.train_images)
    images = sharding.examples(data.train_images)
    labels = sharding.examples(data.train_labels.astype(np.int32))
    first, runs = data.train_images[: config.batch_size], len(config.runs)
    train_step = make_train_step(config, arm, sharding)
    takes = {False: trusting, True: careful(config.max_bad_steps)}
    score = make_score(config, arm, data, sharding)

    def evaluate(progress: Progress, rate: float) -> list[Evaluation]:
        of_runs = np.stack(
            [
                *(progress.state.step, progress.loss, progress.good, progress.bad),
                progress.diverged(config.max_bad_steps),
            ]
        )
        columns = np.repeat(of_runs.reshape(5, -1), config.decays, axis=1)
        return [
            Evaluation(
                *(int(step), loss / good if good else float("nan"), accuracy, rate),
                *(int(bad), bool(diverged), seed, cell),
            )
            for (cell, seed), (step, loss, good, bad, diverged), accuracy in zip(
                config.names,
                columns.T.tolist(),
                score(progress.state).ravel().tolist(),
                strict=True,
            )
            if good or bad or not step
        ]

    @functools.cache
    def compiled(steps: int, with_care: bool) -> jax.stages.Compiled:
        """A call of some steps, compiled ahead so that its first run is timed like any other."""
        watch("compiling", step)
        sizes = {"steps": steps, "batch_size": config.batch_size, "examples": examples}
        options = {"sharding": sharding, "take": takes[with_care]}
        return run_chunk.lower(train_step, progress, images, labels, **sizes, **options).compile()

    def call(steps: int, with_care: bool) -> tuple[Progress, bool, float]:
        """Take some steps; whether they are finite, and the seconds that they took."""
        chunk = compiled(steps, with_care)
        watch("training", step)
        begun = time.perf_counter()
        after, finite = jax.block_until_ready(chunk(progress, images, labels))
        return after, bool(finite), time.perf_counter() - begun

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
    while step < config.steps and not progress.diverged(config.max_bad_steps).all():
        size = next_call(step, config.steps, config.evaluate_every, most)
        after, finite, time_taken = call(size, half or progress.was_bad)
        if not finite:
            after, _, time_taken = call(size, True)
        progress, step = after, step + size
        taken, seconds = taken + size, seconds + time_taken
        over = step == config.steps or progress.diverged(config.max_bad_steps).all()
        if step % config.evaluate_every and not over:
            yield progress, []
            continue
        watch("evaluating", step)
        evaluations = evaluate(progress, taken * config.batch_size / seconds)
        progress, taken, seconds = progress.reported(), 0, 0.0
        yield progress, evaluations


def check_batch_size(config: TrainConfig, data: Dataset) -> None:
    """Refuse a batch that the data cannot fill."""
    if config.batch_size > len(data.train_images):
        raise ValueError(
            f"--batch-size {config.batch_size}: must be at most {len(data.train_images)}, the "
            "number of training images"
        )
