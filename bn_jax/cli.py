"""The command line, `bn-jax COMMAND`, also as `python -m bn_jax COMMAND`.

A command is a function; its arguments, types and docstring are its flags and its help. It imports
slow packages itself, while a line says so, so that help and mistakes are answered at once.
"""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import logging
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as error:
    if sys.argv[1:] == ["--version"]:
        raise SystemExit(f"bn-jax {importlib.metadata.version('bn-jax')}") from error
    raise SystemExit(
        f"bn-jax needs {error.name}; install it from the checkout with: pip install -e '.[train]'"
    ) from error

from bn_jax import __version__, hints
from bn_jax.interrupts import answering_sigterm, no_interrupt_lost
from bn_jax.train.config import TrainConfig
from bn_jax.train.launch import ALONE, Launch
from bn_jax.train.settings import (
    DataSettings,
    ModelSettings,
    NormalizationSettings,
    OptimizerSettings,
    RunSettings,
    dashed,
    unset,
)

stderr = Console(stderr=True)
stdout = Console()


def train(  # noqa: D417
    data: DataSettings,
    model: ModelSettings,
    normalization: NormalizationSettings,
    optimizer: OptimizerSettings,
    run: RunSettings,
    launch: Launch = ALONE,
    resume: Annotated[Path | None, unset("RUN", "start a new run")] = None,
) -> None:
    """Train with batch norm and without, on MNIST, and compare.

    - By default the paper's experiment: 50,000 steps of 60 examples for each.
    - Shows progress, then a table of accuracies and speed.
    - Leaves curves.png, metrics.jsonl, summary.json, config.json and checkpoints
      in the run's folder.
    - After Ctrl-C, SIGTERM or a crash, --resume goes on from the last checkpoint.

    Args:
        resume: Go on with a run that was stopped, in its folder and with its settings.
    """
    fields = vars(data) | vars(model) | vars(normalization) | vars(optimizer) | vars(run)
    config = TrainConfig(**fields)
    unused = config.unused
    if resume is not None:
        reason = f"--resume; {resume} has its own settings"
        unused = dict.fromkeys(fields.keys() - {"data_dir", "device"}, reason)
    hints.check_used(unused, sys.argv[2:])
    start(config, launch, resume)


def sweep(  # noqa: D417
    data: DataSettings,
    model: ModelSettings,
    normalization: NormalizationSettings,
    optimizer: OptimizerSettings,
    run: RunSettings,
    launch: Launch = ALONE,
    over: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME=NUMBER,...", help_behavior_hint="(required)"),
    ] = (),
) -> None:
    """Train with all combinations of some numbers, in one compiled program.

    - Numbers are learning-rate, init-std, decay, epsilon and weight-decay, as in:
      bn-jax sweep --over learning-rate=0.05,0.15,0.5 --seeds 5 --steps 5000
    - Shows progress, then a table of accuracies.
    - Leaves sweep.csv, sweep.jsonl, curves.png, metrics.jsonl, summary.json,
      config.json and checkpoints in the run's folder.
    - After Ctrl-C, SIGTERM or a crash, bn-jax train --resume goes on.

    Args:
        over: Which numbers, and their values; all combinations are trained.
    """
    fields = vars(data) | vars(model) | vars(normalization) | vars(optimizer) | vars(run)
    if not over:
        raise ValueError("--over: must be given, e.g. --over learning-rate=0.05,0.15,0.5")
    config = TrainConfig(**fields, over=over)
    twice = dict.fromkeys(config.axes, "--over; its values come from there")
    hints.check_used(config.unused | twice, sys.argv[2:])
    hints.check_used(config.unused, [f"--{axis}" for axis in config.axes])
    start(config, launch, None)


def start(config: TrainConfig, launch: Launch, resume: Path | None) -> None:
    """Run what `train` and `sweep` were asked for, in one process or as one of several."""
    launch = launch.with_environment(os.environ)
    quiet_orbax()
    with stdout.status("loading JAX"):
        from bn_jax.train.device import choose_device, split_cpu
        from bn_jax.train.experiment import Diverged, Interrupted, run_experiment
        from bn_jax.train.multiprocess import run_with_others
        from bn_jax.train.run_folder import RunFolder

        if resume is not None:
            kept = RunFolder(resume).read_config()
            places = {"data_dir": config.data_dir or kept.data_dir, "run_dir": resume}
            device = kept.device if config.device == "auto" else config.device
            config = dataclasses.replace(kept, **places, device=device)
        if launch.is_alone:
            split_cpu(config.devices)
            choose_device(config.device)
    if not launch.is_alone:
        if stdout.is_terminal:
            stdout.print("waiting for the other processes")
        run_with_others(config, launch, stdout, resume)
        return
    try:
        run_experiment(config, stdout, resume=resume)
    except Interrupted as stop:
        stderr.print(f"[yellow]{escape(str(stop))}[/yellow]", soft_wrap=True)
        raise SystemExit(stop.status) from None
    except Diverged as end:
        stderr.print(f"[red]error:[/red] {escape(str(end))}", soft_wrap=True)
        raise SystemExit(1) from None


def evaluate(
    run: tyro.conf.Positional[Path],
    statistics: Annotated[
        Literal["running", "population", "batch"] | None, unset("KIND", "as the run has it")
    ] = None,
    step: Annotated[int | None, unset("N", "the newest")] = None,
    data_dir: Annotated[Path | None, unset("DIR", "where the run had it")] = None,
) -> None:
    """Score a run's newest checkpoints on the test set.

    Args:
        run: The run's folder, e.g. runs/2026-01-31-120000.
        statistics: Normalize by running, population (200 training batches) or batch statistics.
        step: The step of the checkpoints to score.
        data_dir: The folder with the data set's files.
    """
    quiet_orbax()
    with stdout.status("loading JAX") as status:
        from rich.table import Table

        from bn_jax.train.display import TITLES, cell
        from bn_jax.train.experiment import evaluate_run
        from bn_jax.train.run_folder import RunFolder

        status.update("scoring the test set")
        config = RunFolder(run).read_config()
        rows = evaluate_run(RunFolder(run), data_dir, statistics, step)
    title = f"{run}, {statistics or config.statistics} statistics"
    names = [dashed(name) for name in config.axes]
    table = Table("", *names, "step", "test accuracy", title=title, title_justify="left")
    for row in rows:
        values = (f"{row[name]:g}" for name in config.axes)
        score = cell(row["test_accuracy"], row.get("plus_or_minus"), ".4f").replace("\n", " ")
        table.add_row(TITLES[row["arm"]], *values, f"{row['step']:,}", score)
    stdout.print(table)


def explain(
    run: tyro.conf.Positional[Path],
    data_dir: Annotated[Path | None, unset("PATH", "where the run had it")] = None,
) -> None:
    """Say why a run's networks evaluate otherwise than they trained.

    - Prints, for each network with batch norm, how far the running statistics of
      each layer are from the training images', the test accuracy by running,
      population and batch statistics, what is wrong, and a remedy.
    - Leaves explain.png in the run's folder.

    Args:
        run: The run's folder, e.g. runs/2026-01-31-120000.
        data_dir: The folder with the data set's files.
    """
    quiet_orbax()
    with stdout.status("loading JAX") as status:
        from bn_jax.train.explaining import PICTURE, explain_run
        from bn_jax.train.run_folder import RunFolder

        status.update("comparing statistics")
        for name, report in explain_run(RunFolder(run), data_dir):
            text = str(report).replace("RUN", shlex.quote(str(run)))
            print(f"{name}\n\n{text}\n")
    stdout.print(f"Picture: [bold]{escape(str(run / PICTURE))}[/bold]", soft_wrap=True)


def bench(
    suite: Literal[
        "all", "accuracy", "layer", "train-step", "memory", "compile", "scaling", "fold"
    ] = "all",
    turns: int = 15,
    output_dir: Annotated[Path | None, unset("PATH", "runs/bench-DATE-TIME")] = None,
    data_dir: Annotated[Path | None, unset("PATH", "fetch them once, and cache them")] = None,
) -> None:
    """Measure speed, accuracy and memory against the peers that are installed.

    - Prints tables with bars, and leaves bench.json and plots in a folder.
    - accuracy: errors against float64; exits with 1 where ours miss their bars
    - layer, train-step: the time of one layer, and of a step of training
    - memory, compile: what the backward pass keeps, and how long compiling takes
    - scaling: traffic between devices
    - fold: the time that folding saves at inference

    Args:
        suite: What to measure.
        turns: How many times each contender's turn comes, where time is measured.
        output_dir: Where to leave the results.
        data_dir: A folder with MNIST's four files, for train-step.
    """
    from datetime import datetime

    from bn_jax.bench.allocator import keep_memory

    if turns < 2:
        raise ValueError(f"--turns {turns}: must be at least 2, for quartiles")
    unused = {}
    if suite in ("accuracy", "memory", "scaling"):
        unused["turns"] = f"--suite {suite}, which measures no time"
    if suite not in ("all", "train-step"):
        unused["data_dir"] = f"--suite {suite}; only train-step uses it"
    hints.check_used(unused, sys.argv[2:])
    keep_memory()  # before what takes long, which would be loaded twice
    with stdout.status("loading JAX"):
        from bn_jax.bench.suites import SUITES, run_suites

    folder = output_dir or Path("runs") / f"bench-{datetime.now():%Y-%m-%d-%H%M%S}"
    suites = SUITES if suite == "all" else (suite,)
    if not run_suites(suites, turns=turns, data_dir=data_dir, folder=folder, console=stdout):
        raise SystemExit(1)


def conform(
    targets: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="MODULE:FUNCTION...",
            help_behavior_hint="(one or more, e.g. bn_jax.conform.example)",
        ),
    ] = (),
) -> None:
    """Try any batch norm, of any framework, on vectors with known results.

    - Says what is right, and names the known bug where something is wrong.
    - Whatever else it offers is tried too; .docs/conform.md says what that can be.
    - Exits with 0 if nothing is wrong, 1 if something is, 2 if it cannot be run.

    Args:
        targets: What to try. An object has a function batch_norm. Importing the module runs it.
    """
    from bn_jax.conform.report import try_targets

    if not targets:
        raise ValueError("conform: name a batch norm, e.g. my_module:batch_norm")
    if not try_targets(targets, stdout):
        raise SystemExit(1)


def reproduce(
    claims: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="[CLAIM ...]", help_behavior_hint="(all)")]
    ] = (),
    quick: bool = False,
    seeds: int = 5,
    output_dir: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("runs/reproduce"),
    data_dir: Annotated[Path | None, unset("PATH", "fetch them once, and cache them")] = None,
) -> None:
    """Run the claims of the papers on batch norm, and write a report.

    - Claims are figure-1, robustness, learning-rates, population, renormalization,
      shift, noise, weight-decay, batch-size, tower and covariate-shift.
    - Leaves report.html, report.md, results.json and figures in a folder.
    - Takes about an hour on 2 cores. Claims that the folder has results of are
      not run again; after Ctrl-C, the same command goes on.

    Args:
        claims: Which claims to run.
        quick: Take a few steps of 2 seeds only, to see that everything works.
        seeds: Runs of each method.
        output_dir: Where to leave the report, and what it is made of.
        data_dir: A folder with MNIST's four files.
    """
    if seeds < 2:
        raise ValueError(f"--seeds {seeds}: must be at least 2, for intervals")
    if quick:
        hints.check_used({"seeds": "--quick, which takes 2"}, sys.argv[2:])
    with stdout.status("loading JAX"):
        from bn_jax.reproduce.run import QUICK_SEEDS, reproduce_claims

    folder = output_dir / "quick" if quick else output_dir
    options = {"seeds": QUICK_SEEDS if quick else seeds, "quick": quick, "data_dir": data_dir}
    reproduce_claims(claims, folder=folder, console=stdout, **options)


COMMANDS = {
    "train": train,
    "sweep": sweep,
    "evaluate": evaluate,
    "explain": explain,
    "conform": conform,
    "reproduce": reproduce,
    "bench": bench,
}


def show_help() -> None:
    """Print the commands, each with the first line of its docstring."""
    lines = [
        f"  {name:10}{(inspect.getdoc(f) or '').partition(chr(10))[0]}"
        for name, f in COMMANDS.items()
    ]
    print("usage: bn-jax COMMAND [FLAGS]\n\nBatch normalization for JAX.\n")
    print(*lines, sep="\n")
    print("\nbn-jax COMMAND --help shows the flags of a command, bn-jax --version the versions.")


def run_command(arguments: Sequence[str]) -> None:
    """Run the command that a command line names, or show help or the versions.

    Raises:
        ValueError: it cannot be run; with a hint at what was probably meant.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        show_help()
    elif name in ("-V", "--version", "version"):
        versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "optax")]
        print(f"bn-jax {__version__} ({', '.join(versions)}, Python {platform.python_version()})")
    else:
        hints.check_command(name, tuple(COMMANDS))
        command = COMMANDS[name]
        hints.check_flags(name, hints.describe_flags(command), rest)
        markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
        tyro.cli(command, prog=f"bn-jax {name}", args=rest, config=markers, registry=numbers)


numbers = tyro.constructors.ConstructorRegistry()


@numbers.primitive_rule
def read_as_number(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Read numbers, given or None, with errors that a user understands."""
    readers = {int: ("INT", hints.read_integer), float: ("FLOAT", hints.read_number)}
    if kind.type == float | tuple[float, ...]:
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="FLOAT [FLOAT ...]",
            instance_from_str=read_one_or_several,
            is_instance=lambda value: isinstance(value, int | float | tuple),
            str_from_instance=lambda value: [str(value)],
        )
    for number, (metavar, read) in readers.items():
        if kind.type in (number, number | None):
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar=metavar,
                instance_from_str=lambda words, read=read: read(words[0]),
                is_instance=lambda value: isinstance(value, int | float | None),
                str_from_instance=lambda value: [str(value)],
            )
    return None


def read_one_or_several(words: list[str]) -> float | tuple[float, ...]:
    """One number, or a tuple of several."""
    first, *others = map(hints.read_number, words)
    return (first, *others) if others else first


def quiet_orbax() -> None:
    """Keep orbax from logging pages about errors that it also raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def say_stopped() -> None:
    """Answer a signal that ends the command."""
    stderr.print("[yellow]stopped[/yellow]")


def main() -> None:
    """Run a command; an error that the user can mend is one line and status 2, no traceback."""
    try:
        with no_interrupt_lost(), answering_sigterm(say_stopped):
            try:
                run_command(sys.argv[1:])
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # as in `bn-jax train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        stderr.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say_stopped()
        sys.exit(130)


def program() -> None:
    """`main` as a process of its own.

    After a signal the process ends without Python's teardown, during which XLA's threads, still
    compiling, would crash it (exit status -11 instead of 130).
    """
    status: Any = 130  # also where a second Ctrl-C comes while the first is answered
    try:
        with contextlib.suppress(KeyboardInterrupt):
            main()
            return
    except SystemExit as stop:
        if stop.code not in (130, 143):
            raise
        status = stop.code
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    program()
