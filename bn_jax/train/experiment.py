"""`bn-jax train` and `bn-jax sweep`: the arms of an experiment, and what is left on disk."""

import dataclasses
import json
import shlex
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

from bn_jax.data import Dataset, load
from bn_jax.train.checkpoint import Checkpoints
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.crash_reporter import describe_checkpoints
from bn_jax.train.display import (
    NETWORKS,
    Bar,
    comparison_table,
    grid_table,
    plot_curves,
    plot_grid,
    progress_bars,
)
from bn_jax.train.evaluation import PLACES, arm_settings, load_progress
from bn_jax.train.loop import Evaluation, check_data, train
from bn_jax.train.processes import check_same, is_first
from bn_jax.train.progress import Progress
from bn_jax.train.run_folder import RunFolder, metrics_line
from bn_jax.train.sharding import make_sharding
from bn_jax.train.stopping import asked_to_stop
from bn_jax.train.summary import grid_rows, summarize, to_csv
from bn_jax.train.tensorboard import check_tensorboard, event_files
from bn_jax.train.versions import machine, versions

SCHEMA = 1
"""Of `summary.json` and `metrics.jsonl`; changes when a field is renamed, dropped or redefined."""

Arms = dict[Arm, list[Evaluation]]


class Interrupted(Exception):
    """The run was asked to stop; the message says what is kept, `status` with what to exit."""

    def __init__(self, message: str, status: int = 130) -> None:
        super().__init__(message)
        self.status = status


class Diverged(Exception):
    """An arm has come to its end too early; the message says where and what to do."""


def run_experiment(
    config: TrainConfig,
    console: Console,
    started: Callable[[RunFolder], None] = lambda _: None,
    resume: Path | None = None,
) -> RunFolder:
    """Train every arm of a configuration, show it, and write the run folder.

    Args:
        config: what to train; the same in each of several processes.
        console: where to show it.
        started: is told the folder once it is there.
        resume: the folder of a run of this configuration, which goes on from its checkpoints; None
            makes a new one.

    Raises:
        DataError: the data set cannot be had.
        ValueError: the batch is larger than the data, the run folder is taken, its checkpoints are
            another run's, or processes were started with different settings.
        Interrupted: by Ctrl-C or SIGTERM; the last checkpoint stays good and is named.
        Diverged: an arm has; the other has been trained, and all is shown and written.
    """
    if jax.process_count() > 1:
        if config.devices is None:
            config = dataclasses.replace(config, devices=jax.device_count())
        # Where its files are, each process knows best; process 0's run folder is everyone's.
        check_same({k: v for k, v in dataclasses.asdict(config).items() if k not in PLACES})
    if config.tensorboard:
        check_tensorboard()
    make_sharding(config.devices, config.splits_runs)
    data = load(config.dataset, data_dir=config.data_dir)
    check_data(config, data)
    folder = RunFolder(resume) if resume else RunFolder.create(config)
    started(folder)
    with folder.locked():
        try:
            begun = time.monotonic()
            count = f"{config.devices} × " if (config.devices or 1) > 1 else ""
            where = f"[bold]{escape(str(folder.path))}[/bold]"
            resumed: dict[Arm, Progress | None] = {
                arm: load_progress(config, arm, data, folder) for arm in config.arms
            }
            ended = all(progress and progress.is_over(config) for progress in resumed.values())
            known = folder.read_seconds() if ended else None  # of the run, not of this look at it
            console.print(
                f"This run has ended, run folder {where}; to train longer, start a new one"
                if ended
                else f"Training on {count}{machine()}, run folder {where}",
                soft_wrap=True,
            )
            arms = run_arms(config, data, folder, console, resumed)
            seconds = round(time.monotonic() - begun, 3) if known is None else known
            write_results(config, arms, folder, console, seconds)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {describe_checkpoints(folder.path)}") from None
    diverged = [
        f"{NETWORKS[arm]}{f', seed {e.seed},' if config.seeds > 1 else ''} at step {e.step:,}"
        for arm, evaluations in arms.items()
        for e in evaluations
        if e.diverged
    ]
    if diverged and not config.axes:  # a grid is there to find out where training diverges
        raise Diverged(
            f"diverged: {' and '.join(diverged)}, after {config.max_bad_steps} steps in a row "
            "whose loss or gradients were not finite; the parameters from before these are kept. "
            "A smaller --learning-rate may help"
        )
    return folder


def run_arms(
    config: TrainConfig,
    data: Dataset,
    folder: RunFolder,
    console: Console,
    progresses: Mapping[Arm, Progress | None],
) -> Arms:
    """Train the arms in order, each from how far it has come and with a progress bar."""
    before, arms = folder.read_metrics(), Arms()
    with progress_bars(console, config) as bars, asked_to_stop() as status:
        for arm in config.arms:
            resumed = progresses[arm]
            # The steps after the checkpoint are repeated, with the same results.
            last = np.repeat(resumed.reported_until, config.decays).tolist() if resumed else []
            until = dict(zip(config.names, last, strict=bool(resumed)))
            arms[arm] = [e for e in before.get(arm, []) if e.step <= until.get(e.name, -1)]
            if until != {e.name: e.step for e in arms[arm]}:
                raise ValueError(f"{folder.path}: metrics.jsonl lacks what its checkpoints follow")
            if before:
                folder.write_metrics(before | arms, config)
            run_arm(config, arm, data, folder, arms[arm], bars[arm], resumed, status)
    return arms


def run_arm(
    config: TrainConfig,
    arm: Arm,
    data: Dataset,
    folder: RunFolder,
    evaluations: list[Evaluation],
    bar: Bar,
    resumed: Progress | None,
    status: Callable[[], int],
) -> None:
    """Train one arm; append to its evaluations and metrics, and save checkpoints when due.

    A checkpoint's score is the mean accuracy of all its networks: of each its latest, which for one
    that has diverged is from before.
    """
    saved, grid = resumed.step if resumed else -1, config.grid
    ended = resumed is not None and resumed.is_over(config)  # nothing is compiled for it
    if evaluations:
        bar.show(evaluations[-len(config.names) :])
    settings = arm_settings(config, arm)
    events = folder.path / "tensorboard" / arm if config.tensorboard and is_first() else None
    with (
        Checkpoints(folder.checkpoints(arm), settings, saved, config.keep) as checkpoints,
        event_files(events, saved) as write,
    ):
        for progress, new in () if ended else train(config, arm, data, bar.watch, resumed):
            if new:
                lines = [metrics_line(arm, e, grid[e.cell]) for e in new]
                folder.append("metrics.jsonl", "".join(lines))
                write(new)
                evaluations += new
                bar.show(new)
            stop = status()
            due = new and progress.step >= max(saved, 0) + config.checkpoint_every
            if due or stop or progress.is_over(config):
                latest = {e.name: e.test_accuracy for e in evaluations}
                checkpoints.save(progress, statistics.fmean(latest.values()) if new else None)
                saved = progress.step
            if stop:
                where = f"at step {progress.step:,} of {NETWORKS[arm]}"
                again = shlex.join(["bn-jax", "train", "--resume", str(folder.path)])
                raise Interrupted(f"stopped {where}; to go on: {again}", stop)
    bar.watch(None, evaluations[-1].step)


def write_results(
    config: TrainConfig, arms: Arms, folder: RunFolder, console: Console, seconds: float
) -> None:
    """Write the comparison and show it."""
    if config.axes:
        rows = grid_rows(arms, config)
        folder.write("sweep.csv", to_csv(rows))
        folder.write("sweep.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        summary, table, picture = {"rows": rows}, grid_table(rows, config), plot_grid(rows, config)
    else:
        summary = summarize(arms)
        table, picture = comparison_table(summary, config), plot_curves(arms, config)
    settings = json.loads(config.to_json())
    about = {"schema": SCHEMA, "seconds": seconds, "config": settings, "versions": versions()}
    folder.write("summary.json", json.dumps(summary | about, indent=2) + "\n")
    folder.write("curves.png", picture)
    console.print(table)
    again = shlex.join(["bn-jax", "evaluate", str(folder.path)])
    for what, line in (
        ("Curves", folder.path / "curves.png"),
        ("Score the checkpoints again", again),
    ):
        console.print(f"{what}: [bold]{escape(str(line))}[/bold]", soft_wrap=True)
