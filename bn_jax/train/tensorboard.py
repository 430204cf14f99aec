"""TensorBoard's event files, of which each run and average has a folder of its own."""

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bn_jax.train.loop import Evaluation

SCALARS = ("train_loss", "test_accuracy", "examples_per_second", "bad_steps")


def check_tensorboard() -> None:
    """Refuse to go on without tensorboardX, which writes the files without TensorFlow."""
    try:
        importlib.import_module("tensorboardX")
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
    if folder is None:
        yield lambda _: None
        return
    tensorboard_x: Any = importlib.import_module("tensorboardX")

    with ExitStack() as stack:

        @functools.cache
        def writer(name: str) -> Any:
            return stack.enter_context(
                tensorboard_x.SummaryWriter(str(folder / name), purge_step=since + 1)
            )

        def write(evaluations: Sequence[Evaluation]) -> None:
            for evaluation in evaluations:
                events = writer(f"cell-{evaluation.cell}-seed-{evaluation.seed}")
                for name in SCALARS:
                    if not math.isnan(value := getattr(evaluation, name)):  # no loss at step 0
                        events.add_scalar(name, value, evaluation.step)
                events.flush()

        yield write
