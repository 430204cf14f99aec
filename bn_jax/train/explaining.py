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
from bn_jax.train.experiment import load_run, members
from bn_jax.train.run_folder import RunFolder, RunFolderError
from bn_jax.train.scoring import BATCHES, Statistics, inputs, score, training_mode

PICTURE = "explain.png"
EVALUATED = 60  # evaluation batches


def explain_run(folder: RunFolder, data_dir: Path | None = None) -> Iterator[tuple[str, Report]]:
    """The report on each network with batch norm, under its name; then writes their picture.

    Its statistics are compared with those of 200 training batches, as the run drew them, and of 60
    batches of test images; and the test images are scored by each kind of statistics.

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
    arm: Arm = "batch"
    data, trained = load_run(folder, config, data_dir)
    if arm not in trained:
        raise CheckpointError(f"{folder.path} holds no sound checkpoint with batch norm; train on")
    model = build_model(config, arm)
    kinds: tuple[Statistics, ...] = ("running", "population", "batch")
    batch_size, binarization = config.batch_size, config.binarization
    reports: dict[str, Report] = {}
    for seed, state in zip(
        config.all_seeds, members(trained[arm].state, config.seeds), strict=True
    ):
        report = explain_linen(
            training_mode(model),
            {"params": state.params, "batch_stats": state.batch_stats},
            inputs(data.train_images[: BATCHES * batch_size], batch_size, binarization),
            inputs(data.test_images[: EVALUATED * batch_size], batch_size, binarization),
            batch_size=batch_size,
        )
        scores = {k: score(model, binarization, batch_size, state, data, k) for k in kinds}
        name = f"{TITLES[arm]}, seed {seed}" if config.seeds > 1 else TITLES[arm]
        reports[name] = dataclasses.replace(report, api="run", scores=scores)
        yield name, reports[name]
    try:
        write_whole(folder.path / PICTURE, to_png(draw(reports)))
    except OSError as error:
        raise RunFolderError(
            f"{folder.path / PICTURE} cannot be written ({error.strerror or error}); make room, or "
            "give permission"
        ) from error
