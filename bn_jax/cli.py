"""The command line: `bn-jax train`, `evaluate` and `bench`, also as `python -m bn_jax`.

A command is a function; its arguments, types and docstring are its flags and its help.
"""

import _thread
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

try:
    import tyro
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as error:
    raise SystemExit(
        f"bn-jax needs {error.name} to train; install it with: pip install 'bn-jax[train]'"
    ) from error

from bn_jax.train.config import TrainConfig
from bn_jax.train.launch import ALONE, Launch

app = tyro.extras.SubcommandApp()
stderr = Console(stderr=True)
stdout = Console()


@app.command
def train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    launch: Annotated[Launch, tyro.conf.arg(name="")] = ALONE,
) -> None:
    """Train with batch norm and without, on MNIST, and compare.

    By default the paper's experiment: 3 hidden layers of 100 sigmoids, 50,000 steps of 60
    examples. Shows progress, prints a table, and leaves config.json, metrics.jsonl, summary.json,
    curves.png and checkpoints in the run's folder.
    """
    from bn_jax.train.company import run_in_company
    from bn_jax.train.device import choose_device, split_cpu
    from bn_jax.train.experiment import Interrupted, run_experiment

    launch = launch.with_environment(os.environ)
    # Of what it also raises, orbax logs pages.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if not launch.is_alone:
        run_in_company(config, launch, stdout)
        return
    split_cpu(config.devices)
    choose_device(config.device)
    try:
        run_experiment(config, stdout)
    except Interrupted as stop:
        stderr.print(f"[yellow]{escape(str(stop))}[/yellow]", soft_wrap=True)
        raise SystemExit(130) from None


@app.command
def evaluate(run: tyro.conf.Positional[Path], data_dir: Path | None = None) -> None:
    """Score a run's newest checkpoints on the test set, by their running statistics.

    Args:
        run: The run's folder.
        data_dir: The folder with the data set's files, if no longer where the run had it.
    """
    from rich.table import Table

    from bn_jax.train.display import TITLES
    from bn_jax.train.experiment import evaluate_run
    from bn_jax.train.run_folder import RunFolder

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    table = Table("", "step", "test accuracy", title=str(run), title_justify="left")
    for arm, row in evaluate_run(RunFolder(run), data_dir).items():
        table.add_row(TITLES[arm], f"{row['step']:,}", f"{row['test_accuracy']:.4f}")
    stdout.print(table)


@app.command
def bench(
    suite: Literal[
        "all", "accuracy", "layer", "train-step", "memory", "compile", "scaling", "fold"
    ] = "all",
    turns: int = 15,
    output_dir: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Measure speed, accuracy and memory against the peers that are installed.

    Prints tables with bars, and leaves bench.json and plots in a folder. Exits with 1 where our
    accuracy falls short of its bars.

    Args:
        suite: What to measure: one layer's time, a training step's, errors against float64,
            memory for the backward pass, compile time, traffic between devices, what folding saves.
        turns: How many times each contender's turn comes, where time is measured.
        output_dir: Where to leave the results; by default bench-<date and time> under runs.
        data_dir: A folder with MNIST's files, for train-step.
    """
    from datetime import datetime

    from bn_jax.bench.suites import SUITES, keep_memory, run_suites

    if turns < 2:
        raise ValueError(f"--turns {turns}: must be at least 2, for quartiles")
    keep_memory()
    folder = output_dir or Path("runs") / f"bench-{datetime.now():%Y-%m-%d-%H%M%S}"
    suites = SUITES if suite == "all" else (suite,)
    if not run_suites(suites, turns=turns, data_dir=data_dir, folder=folder, console=stdout):
        raise SystemExit(1)


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """See to it that Ctrl-C stops the command also where Python has to ignore exceptions.

    In a callback of the garbage collector, of which JAX has some, a KeyboardInterrupt is printed
    and forgotten. Here it comes again a moment later, until it arrives where it counts.
    """
    report = sys.unraisablehook

    def resend(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, interrupt_main_thread).start()
        else:
            report(lost)

    sys.unraisablehook = resend
    try:
        yield
    finally:
        sys.unraisablehook = report


def interrupt_main_thread() -> None:
    """As Ctrl-C does: also out of a system call, where the platform can."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def main() -> None:
    """Run a command; what the user can mend is one line and status 2, not a traceback."""
    try:
        with no_interrupt_lost():
            app.cli(prog="bn-jax", description="Batch normalization for JAX.")
    except (ValueError, OSError) as error:
        stderr.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        stderr.print("[yellow]stopped[/yellow]")
        sys.exit(130)


if __name__ == "__main__":
    main()
