"""`bn-jax train` and `bn-jax sweep`."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from bn_jax import hints
from bn_jax.commands import console
from bn_jax.flag_values import check_axes
from bn_jax.train.config import TrainConfig
from bn_jax.train.flags import unset
from bn_jax.train.grid import SWEPT, read_axes
from bn_jax.train.launch import ALONE, Launch
from bn_jax.train.settings import (
    DataSettings,
    ModelSettings,
    NormalizationSettings,
    OptimizerSettings,
    RunSettings,
)


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
        reason = (
            f"--resume; {resume} has its own settings. To train longer, or otherwise, start a new "
            "run without --resume"
        )
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

    - Numbers are learning-rate, init-std, decay, epsilon, weight-decay, r-max and
      d-max, as in:
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
    if sum(word.partition("=")[0] == "--over" for word in sys.argv) > 1:  # tyro takes the last
        raise ValueError("--over: give it once, e.g. --over learning-rate=0.1,0.3 decay=0.9,0.99")
    check_axes(over, {name: hints.flag_of(name) for name in SWEPT})
    config = TrainConfig(**fields, over=over)
    swept = read_axes(over)
    twice = dict.fromkeys(swept, "--over; its values come from there")
    hints.check_used(config.unused | twice, sys.argv[2:])
    hints.check_used(config.unused, [f"--{name}" for name in swept])
    start(config, launch, None)


def start(config: TrainConfig, launch: Launch, resume: Path | None) -> None:
    """Run what `train` and `sweep` were asked for, in one process or as one of several."""
    launch = launch.with_environment(os.environ)
    console.quiet_orbax()
    with console.stdout.status("loading JAX"):
        from bn_jax.train.experiment import Diverged, Interrupted, run_experiment
        from bn_jax.train.multiprocess import run_with_others
        from bn_jax.train.run_folder import RunFolder
        from bn_jax.train.sharding import choose_devices

        if resume is not None:
            kept = RunFolder(resume).read_config()
            places = {"data_dir": config.data_dir or kept.data_dir, "run_dir": resume}
            device = kept.device if config.device == "auto" else config.device
            config = dataclasses.replace(kept, **places, device=device)
        if launch.is_alone:
            choose_devices(config.device, config.devices)
    if not launch.is_alone:
        if console.stdout.is_terminal:
            console.stdout.print("waiting for the other processes")
        run_with_others(config, launch, console.stdout, resume)
        return
    try:
        run_experiment(config, console.stdout, resume=resume)
    except Interrupted as stop:
        console.stderr.print(f"[yellow]{escape(str(stop))}[/yellow]", soft_wrap=True)
        raise SystemExit(stop.status) from None
    except Diverged as end:
        console.stderr.print(f"[red]error:[/red] {escape(str(end))}", soft_wrap=True)
        raise SystemExit(1) from None
