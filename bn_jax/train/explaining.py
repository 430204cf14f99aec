"""`bn-jax explain`: why the networks of a run evaluate otherwise than they trained."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from bn_jax.explain.models import explain_linen
from bn_jax.explain.picture import draw, to_png
from bn_jax.explain.report import Report
from bn_jax.files import write_whole
from bn_jax.train.build import build_model
from bn_jax.train.checkpoint import CheckpointError
from bn_jax.train.config import Arm
from bn_jax.train.display import TITLES
from bn_jax.train.evaluation import load_run
from bn_jax.train.run_folder import RunFolder, RunFolderError
from bn_jax.train.scoring import BATCHES, inputs, make_score, training_mode
from bn_jax.train.state import members

PICTURE = "explain.png"
EVALUATED = 60  # evaluation batches


def explain_run(folder: RunFolder, data_dir: Path | None = None) -> Iterator[tuple[str, Report]]:
    """The report on each network with batch norm, under its name; then writes their picture.

    Its statistics are compared with those of 200 batches of training images, and of 60 batches
    of test images; and the test images are scored by each kind of statistics.

    Args:
        folder: of a run.
        data_dir: where the data set is, if no longer where the run had it.

    Raises:
        RunFolderError, CheckpointError, DataError: what is missing or damaged.
        ValueError: no network of the run has batch norm.
    """
    config = folder.read_config()
    if "batch" not in config.arms:
        raise ValueError(f"{folder.path} has no network with batch norm to explain")
    if config.axes:
        raise ValueError(
            f"{folder.path} holds a grid of runs, or several averages; explain a run with one "
            "value of each number"
        )
    arm: Arm = "batch"
    data, trained = load_run(folder, config, data_dir)
    if arm not in trained:
        raise CheckpointError(f"{folder.path} holds no sound checkpoint with batch norm; train on")
    forward = training_mode(build_model(config, arm))
    batch_size, binarization = config.batch_size, config.binarization
    reports: dict[str, Report] = {}
    scores = {
        kind: make_score(config.with_values({"statistics": kind}), arm, data)(trained[arm].state)
        for kind in ("running", "population", "batch")
    }
    for number, state in enumerate(members(trained[arm].state, config)):
        report = explain_linen(
            forward,
            {"params": state.params, "batch_stats": state.batch_stats},
            inputs(data.train_images[: BATCHES * batch_size], batch_size, binarization),
            inputs(data.test_images[: EVALUATED * batch_size], batch_size, binarization),
            batch_size=batch_size,
        )
        own = {kind: float(each[number, 0]) for kind, each in scores.items()}
        seed = f", seed {config.all_seeds[number]}" if config.seeds > 1 else ""
        name = TITLES[arm] + seed
        reports[name] = dataclasses.replace(report, api="run", scores=own)
        yield name, reports[name]
    try:
        write_whole(folder.path / PICTURE, to_png(draw(reports)))
    except OSError as error:
        raise RunFolderError(
            f"{folder.path / PICTURE} cannot be written ({error.strerror or error}); make room, or "
            "give permission"
        ) from error
