"""`bn-jax train` and `bn-jax evaluate`: the arms of an experiment, and what is left on disk."""

import dataclasses
import json
import platform
import shlex
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape

import bn_jax
from bn_jax.data import Dataset, load
from bn_jax.train.build import build_model, build_optimizer
from bn_jax.train.checkpoint import CheckpointError, Checkpoints, load_newest, newest_checkpoint
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.display import TITLES, comparison_table, plot_curves, progress_bars
from bn_jax.train.loop import Activity, Evaluation, Watch, check_batch_size, train
from bn_jax.train.placement import make_placement
from bn_jax.train.processes import check_same
from bn_jax.train.run_folder import RunFolder, finite, metrics_line
from bn_jax.train.step import accuracy, init_state
from bn_jax.train.summary import summarize
from bn_jax.train.witness import remains

NO_LOSS = "  –   "  # as wide as one


class Interrupted(Exception):
    """The user stopped the run; the message says what is kept."""


class Diverged(Exception):
    """An arm has come to its end too early; the message says where and what to do."""


def run_experiment(
    config: TrainConfig, console: Console, started: Callable[[RunFolder], None] = lambda _: None
) -> RunFolder:
    """Train every arm of a configuration, show it, and write the run folder.

    Args:
        config: what to train; the same in each of several processes.
        console: where to show it.
        started: is told the folder once it is there.

    Raises:
        DataError: the data set cannot be had.
        ValueError: the batch is larger than the data, the run folder is taken, or processes were
            started with different settings.
        Interrupted: by Ctrl-C; the last checkpoint stays good and is named.
        Diverged: an arm has; the other has been trained, and all is shown and written.
    """
    if jax.process_count() > 1:
        if config.devices is None:
            config = dataclasses.replace(config, devices=jax.device_count())
        # Where its files are, each process knows best; process 0's run folder is everyone's.
        own = ("data_dir", "run_dir", "device")
        check_same({k: v for k, v in dataclasses.asdict(config).items() if k not in own})
    make_placement(config.devices)
    data = load(config.dataset, data_dir=config.data_dir)
    check_batch_size(config, data)
    folder = RunFolder.create(config)
    started(folder)
    where = f"[bold]{escape(str(folder.path))}[/bold]"
    try:
        count = f"{config.devices} × " if (config.devices or 1) > 1 else ""
        console.print(f"Training on {count}{machine()}, run folder {where}", soft_wrap=True)
        arms = run_arms(config, data, folder, console)
        summary = summarize(arms) | {"config": json.loads(config.to_json()), "versions": versions()}
        folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
        folder.write("curves.png", plot_curves(arms, config))
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {remains(folder.path)}") from None
    console.print(comparison_table(summary, config))
    console.print(f"Curves: [bold]{escape(str(folder.path / 'curves.png'))}[/bold]", soft_wrap=True)
    again = escape(shlex.join(["bn-jax", "evaluate", str(folder.path)]))
    console.print(f"Score the checkpoints again: [bold]{again}[/bold]", soft_wrap=True)
    ends = {TITLES[arm]: evaluations[-1] for arm, evaluations in arms.items()}
    if diverged := [f"{arm} at step {end.step:,}" for arm, end in ends.items() if end.diverged]:
        raise Diverged(
            f"diverged: {' and '.join(diverged)}, after {config.max_bad_steps} steps in a row "
            "whose loss or gradients were not finite; the parameters from before these are kept. "
            "A smaller --learning-rate may help"
        )
    return folder


def run_arms(
    config: TrainConfig, data: Dataset, folder: RunFolder, console: Console
) -> dict[Arm, list[Evaluation]]:
    """Train the arms in order, each under a live bar."""
    arms: dict[Arm, list[Evaluation]] = {}
    with progress_bars(console) as progress:
        waiting = {"total": config.steps, "loss": NO_LOSS, "accuracy": "  –  ", "activity": None}
        tasks = {a: progress.add_task(TITLES[a], start=False, **waiting) for a in config.arms}
        for arm in config.arms:
            progress.start_task(tasks[arm])

            def watch(activity: Activity, step: int, task: Any = tasks[arm]) -> None:
                progress.update(task, completed=step, activity=(activity, time.monotonic()))

            def show(evaluation: Evaluation, task: Any = tasks[arm]) -> None:
                progress.update(
                    task,
                    # Before the first step there is no loss.
                    loss=f"{evaluation.train_loss:.4f}" if evaluation.step else NO_LOSS,
                    accuracy=f"{evaluation.test_accuracy:.4f}",
                )

            arms[arm] = run_arm(config, arm, data, folder, show, watch)
            progress.update(tasks[arm], completed=arms[arm][-1].step, activity=None)
    return arms


def run_arm(
    config: TrainConfig,
    arm: Arm,
    data: Dataset,
    folder: RunFolder,
    show: Callable[[Evaluation], None],
    watch: Watch,
) -> list[Evaluation]:
    """Train one arm, writing a line of metrics per evaluation and checkpoints as they fall due."""
    evaluations, saved = [], 0
    model, optimizer = build_model(config, arm), build_optimizer(config)
    with Checkpoints(folder.checkpoints(arm)) as checkpoints:
        for progress, evaluation in train(config, model, optimizer, data, watch):
            if evaluation is None:
                continue
            evaluations.append(evaluation)
            folder.append("metrics.jsonl", metrics_line(arm, evaluation))
            show(evaluation)
            due = evaluation.step >= saved + config.checkpoint_every
            if due or evaluation.step == config.steps or evaluation.diverged:
                checkpoints.save(progress.state)
                saved = evaluation.step
    return evaluations


def evaluate_run(folder: RunFolder, data_dir: Path | None = None) -> dict[Arm, dict[str, Any]]:
    """The test accuracy of each arm's newest checkpoint, by its running statistics.

    An arm without one, as in a run that was stopped early, is left out.

    Args:
        folder: of a run.
        data_dir: where the data set is, if no longer where the run had it.

    Raises:
        RunFolderError, CheckpointError, DataError: what is missing or damaged.
    """
    config = folder.read_config()
    trained: list[Arm] = [arm for arm in config.arms if newest_checkpoint(folder.checkpoints(arm))]
    if not trained:
        raise CheckpointError(f"{folder.path} holds no finished checkpoint; train again")
    data = load(config.dataset, data_dir=data_dir or config.data_dir)
    results: dict[Arm, dict[str, Any]] = {}
    for arm in trained:
        model, optimizer = build_model(config, arm), build_optimizer(config)
        like = jax.eval_shape(
            lambda m=model, o=optimizer: init_state(m, o, data.test_images[:2], 0)
        )
        state = load_newest(folder.checkpoints(arm), like)
        score = accuracy(model, config.binarization, state, data.test_images, data.test_labels)
        results[arm] = finite({"step": int(state.step), "test_accuracy": score})
    return results


def versions() -> dict[str, str]:
    """The versions and hardware that a result belongs to."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {
        "bn-jax": bn_jax.__version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": machine(),
    }


def machine() -> str:
    """The device in words, and JAX's version."""
    (device,) = jnp.zeros(()).devices()  # where new arrays go, which --device may have changed
    kind = "" if device.device_kind.lower() == device.platform else f" ({device.device_kind})"
    return f"{device.platform.upper()}{kind}, jax {jax.__version__}"
