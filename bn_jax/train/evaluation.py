"""`bn-jax evaluate`: the networks of a run, loaded from its checkpoints and scored."""

import json
from pathlib import Path
from typing import Any

import jax

from bn_jax.data import Dataset, load
from bn_jax.train.checkpoint import CheckpointError, load_newest, newest_checkpoint
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.progress import Progress, begin
from bn_jax.train.run_folder import RunFolder
from bn_jax.train.scoring import Statistics, make_score
from bn_jax.train.state import init_runs
from bn_jax.train.summary import estimate

PLACES = ("data_dir", "run_dir", "device")
"""Settings that may differ between the processes of a run, and when it goes on elsewhere."""


def load_progress(
    config: TrainConfig, arm: Arm, data: Dataset, folder: RunFolder, step: int | None = None
) -> Progress | None:
    """How far an arm has come, by its newest sound checkpoint, or that of a step; None without."""
    like = jax.eval_shape(lambda: begin(init_runs(config, arm, data.test_images[:2])))
    return load_newest(folder.checkpoints(arm), like, arm_settings(config, arm), step)


def arm_settings(config: TrainConfig, arm: Arm) -> dict[str, Any]:
    """What makes a checkpoint that of an arm of a run, wherever it is."""
    fields = json.loads(config.to_json())
    return {k: v for k, v in fields.items() if k not in PLACES} | {"arm": arm}


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


def load_run(
    folder: RunFolder,
    config: TrainConfig,
    data_dir: Path | None = None,
    step: int | None = None,
) -> tuple[Dataset, dict[Arm, Progress]]:
    """The data set of a run, and how far each arm has come that has a sound checkpoint.

    Raises:
        RunFolderError, CheckpointError, DataError: as `evaluate_run`.
    """
    found = "" if step is None else f" of step {step:,}"
    nothing = CheckpointError(f"{folder.path} holds no sound checkpoint{found}; train again")
    if not any(newest_checkpoint(folder.checkpoints(arm)) for arm in config.arms):
        raise nothing
    data = load(config.dataset, data_dir=data_dir or config.data_dir)
    trained: dict[Arm, Progress] = {}
    for arm in config.arms:
        if progress := load_progress(config, arm, data, folder, step):
            trained[arm] = progress
    if not trained:
        raise nothing
    return data, trained
