"""TensorBoard's event files, of which each run and average has a folder of its own."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bn_jax.train.loop import Evaluation

SCALARS = ("train_loss", "test_accuracy", "examples_per_second", "bad_steps")


def check_tensorboard() -> Any:
    """The module tensorboardX, which writes the files without TensorFlow, or a ValueError."""
    try:
        return importlib.import_module("tensorboardX")
    except ModuleNotFoundError as error:
        raise ValueError(
            "--tensorboard needs tensorboardX; install it with: pip install tensorboardX"
        ) from error


@contextmanager
def event_files(
    folder: Path | None, since: int
) -> Iterator[Callable[[Sequence[Evaluation]], None]]:
    """Yields a function that writes evaluations down.

    Args:
        folder: of an arm, which gets a folder per run; None writes nothing.
        since: the step from which the run goes on; TensorBoard forgets what came later.
    """
    writers: dict[str, Any] = {}

    def write(evaluations: Sequence[Evaluation]) -> None:
        for evaluation in evaluations if folder else ():
            name = f"{folder}/cell-{evaluation.cell}-seed-{evaluation.seed}"
            if name not in writers:
                writers[name] = check_tensorboard().SummaryWriter(name, purge_step=since + 1)
            for scalar in SCALARS:
                if not math.isnan(value := getattr(evaluation, scalar)):  # no loss at step 0
                    writers[name].add_scalar(scalar, value, evaluation.step)
            writers[name].flush()

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()
