"""`bn-jax evaluate` and `bn-jax explain`: the networks of a run, loaded from its checkpoints."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.data import Dataset, load
from bn_jax.explain.models import explain_linen
from bn_jax.explain.picture import draw, to_png
from bn_jax.explain.report import Report
from bn_jax.files import write_whole
from bn_jax.train.build import build_model
from bn_jax.train.checkpoint import CheckpointError, finished, load_newest, newest_checkpoint
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.display import TITLES
from bn_jax.train.loop import make_sample
from bn_jax.train.progress import Progress, begin
from bn_jax.train.run_folder import RunFolder, writing
from bn_jax.train.scoring import BATCHES, Statistics, inputs, make_score, training_mode
from bn_jax.train.state import init_runs, members
from bn_jax.train.summary import estimate

PLACES = ("data_dir", "run_dir", "device")
"""Settings that may differ between the processes of a run, and when it goes on elsewhere."""

PICTURE = "explain.png"
EVALUATED = 60  # batches of test images, by which networks are explained


def arm_settings(config: TrainConfig, arm: Arm) -> dict[str, Any]:
    """What makes a checkpoint that of an arm of a run, wherever it is."""
    fields = json.loads(config.to_json())
    return {k: v for k, v in fields.items() if k not in PLACES} | {"arm": arm}


def load_progress(
    config: TrainConfig, arm: Arm, data: Dataset, folder: RunFolder, step: int | None = None
) -> Progress | None:
    """How far an arm has come, by its newest sound checkpoint, or that of a step; None without."""
    like = jax.eval_shape(lambda: begin(init_runs(config, arm, data.test_images[:2])))
    return load_newest(folder.checkpoints(arm), like, arm_settings(config, arm), step)


def load_run(
    folder: RunFolder, config: TrainConfig, data_dir: Path | None = None, step: int | None = None
) -> tuple[Dataset, dict[Arm, Progress]]:
    """The data set of a run, and how far each arm has come that has a sound checkpoint.

    Raises:
        RunFolderError, CheckpointError, DataError: what is missing or damaged.
    """
    trained: dict[Arm, Progress] = {}
    if any(newest_checkpoint(folder.checkpoints(arm)) for arm in config.arms):
        data = load(config.dataset, data_dir=data_dir or config.data_dir)
        for arm in config.arms:
            if progress := load_progress(config, arm, data, folder, step):
                trained[arm] = progress
        if trained:
            return data, trained
    paths = [path for arm in config.arms for path in finished(folder.checkpoints(arm))]
    kept = sorted({int(path.name) for path in paths})
    if step is None or step in kept or not kept:
        found = "" if step is None else f" of step {step:,}"
        raise CheckpointError(f"{folder.path} holds no sound checkpoint{found}; train again")
    names = [f"{number:,}" for number in kept]
    names[3:-3] = ["…"] if len(names) > 6 else names[3:-3]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    hint = "" if config.keep == "all" else " (train with --keep all to keep every one)"
    raise CheckpointError(
        f"{folder.path} has no checkpoint of step {step:,}; it kept {listed}{hint}"
    )


def evaluate_run(
    folder: RunFolder,
    data_dir: Path | None = None,
    statistics: Statistics | None = None,
    step: int | None = None,
) -> list[dict[str, Any]]:
    """The test accuracy of each arm's newest sound checkpoint, and of each combination of a grid.

    An arm without a checkpoint, as in a run that was stopped early, is left out.

    Args:
        folder: of a run.
        data_dir: where the data set is, if no longer where the run had it.
        statistics: what batch norms normalize by; None for what the run was evaluated by.
        step: of the checkpoints; None for the newest.

    Raises:
        RunFolderError, CheckpointError, DataError: what is missing or damaged.
    """
    config = folder.read_config()
    data, trained = load_run(folder, config, data_dir, step)
    one = config.with_values({"statistics": statistics or config.statistics})
    rows: list[dict[str, Any]] = []
    for arm, progress in trained.items():
        scores = make_score(one, arm, data)(progress.state).ravel().tolist()
        for number, values in enumerate(config.grid):
            known = zip(config.names, scores, strict=True)
            seeds = [score for (cell, _), score in known if cell == number]
            mean, half = estimate(seeds)
            row = {"arm": arm, **values, "step": progress.step, "test_accuracy": mean}
            rows.append(row | ({"plus_or_minus": half, "seeds": seeds} if len(seeds) > 1 else {}))
    return rows


def explain_run(folder: RunFolder, data_dir: Path | None = None) -> Iterator[tuple[str, Report]]:
    """The report on each network with batch norm, under its name; then writes their picture.

    Its statistics are compared with those of 200 batches, drawn as in training, and of 60 batches
    of test images; and the test images are scored by each kind of statistics.

    Raises:
        RunFolderError, CheckpointError, DataError: what is missing or damaged.
        ValueError: no network of the run has batch norm, or the run is a grid.
    """
    config, arm = folder.read_config(), "batch"
    if arm not in config.arms:
        raise ValueError(f"{folder.path} has no network with batch norm to explain")
    if config.axes:
        raise ValueError(
            f"{folder.path} holds a grid of runs, or several averages; explain a run with one "
            "value of each number"
        )
    data, trained = load_run(folder, config, data_dir)
    if arm not in trained:
        raise CheckpointError(f"{folder.path} holds no sound checkpoint with batch norm; train on")
    state, size = trained[arm].state, config.batch_size
    scores = {
        kind: make_score(config.with_values({"statistics": kind}), arm, data)(state)
        for kind in ("running", "population", "batch")
    }
    count = len(data.train_images)
    batches = jax.random.key(0), jnp.int32(0), min(BATCHES, count // size), size, count
    train = data.train_images[np.ravel(make_sample(config, data)(*batches))]
    reports: dict[str, Report] = {}
    for number, one in enumerate(members(state, config)):
        report = explain_linen(
            training_mode(build_model(config, arm)),
            {"params": one.params, "batch_stats": one.batch_stats},
            inputs(train, size, config.binarization),
            inputs(data.test_images[: EVALUATED * size], size, config.binarization),
            batch_size=size,
        )
        own = {kind: float(each[number, 0]) for kind, each in scores.items()}
        name = TITLES[arm] + (f", seed {config.all_seeds[number]}" if config.seeds > 1 else "")
        reports[name] = dataclasses.replace(report, api="run", scores=own)
        yield name, reports[name]
    with writing(folder.path / PICTURE, otherwise="") as path:
        write_whole(path, to_png(draw(reports)))
