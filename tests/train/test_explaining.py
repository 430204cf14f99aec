"""`bn-jax explain` on small runs, in this process: what it says, leaves and refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from bn_jax.train import evaluation
from bn_jax.train.checkpoint import Checkpoints
from bn_jax.train.config import TrainConfig
from bn_jax.train.evaluation import arm_settings
from bn_jax.train.progress import begin
from bn_jax.train.run_folder import RunFolder
from bn_jax.train.state import init_runs

pytestmark = pytest.mark.usefixtures("on_digits")


def make_run(path, images, plant=lambda stats: stats, **options):
    """The folder of a run whose only checkpoint has the initial weights."""
    tiny = {"hidden": (8, 4), "batch_size": 20, "norm": "batch"} | options
    config = TrainConfig(run_dir=path, **tiny)
    folder, settings = RunFolder.create(config), arm_settings(config, "batch")
    with Checkpoints(folder.checkpoints("batch"), settings) as checkpoints:
        progress = begin(init_runs(config, "batch", images))
        state = progress.state._replace(batch_stats=plant(progress.state.batch_stats))
        checkpoints.save(progress._replace(state=state))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """Of two seeds; their running statistics are of other weights."""

    def stale(stats):
        random = np.random.default_rng(0)
        return jax.tree.map(lambda s: s + random.uniform(1, 3, s.shape).astype(s.dtype), stats)

    path = tmp_path_factory.mktemp("runs") / "a run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bn_jax.train.evaluation.load", lambda *_, **__: digits)
        return make_run(path, digits.test_images[:2], stale, seeds=2)


def test_every_network_is_explained(runs, main, capsys):
    assert main("explain", runs) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for seed in (0, 1):
        part = out.partition(f"with batch norm, seed {seed}\n")[2]
        assert part.startswith("\nlayer")
        assert all(f"\nNormalizedLayer_{n} " in part for n in (0, 1))
        assert "\naccuracy by statistics: 0." in part
        assert "\nother weights (all layers): running statistics do not belong" in part
        remedy = f"bn-jax evaluate '{runs}' --statistics population"  # as one would type it
        assert f"\nRemedy:\n    {remedy}\n" in part
    assert "pure batches" not in out
    assert out.endswith(f"\nPicture: {runs}/explain.png\n")
    with Image.open(runs / "explain.png") as picture:
        picture.load()
        assert picture.width > 800
    assert not list(runs.glob("*.partial"))


def test_a_picture_is_whole_or_not_there(runs, main, capsys, monkeypatch):
    (runs / "explain.png").unlink(missing_ok=True)
    (runs / "explain.png" / "taken").mkdir(parents=True)
    try:
        assert main("explain", runs) == 2
        out, err = capsys.readouterr()
        assert "accuracy by statistics" in out  # what was found is told all the same
        assert f"error: {runs}/explain.png cannot be written (" in err
        assert err.endswith("); make room or give permission\n")
        assert {path.name for path in runs.iterdir() if "explain" in path.name} == {"explain.png"}
    finally:
        shutil.rmtree(runs / "explain.png")


def test_what_cannot_be_explained(tmp_path, main, capsys, runs):
    def message(folder):
        assert main("explain", folder) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    assert message(tmp_path / "nowhere").endswith(
        "nowhere is no run: it has no config.json; give the folder of a run\n"
    )
    for name, change, words in (
        ("plain", {"norm": "none"}, "has no network with batch norm to explain"),
        (
            "grid",
            {"over": ["decay=0.9,0.99"]},
            "holds a grid of runs, or several averages; explain a run with one value of each "
            "number",
        ),
        ("empty", {}, "holds no sound checkpoint; train again"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((runs / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        assert message(folder) == f"error: {folder} {words}\n"


def test_batches_are_drawn_as_in_training(tmp_path, monkeypatch, digits):
    """So that of class-pure batches, one learns that they are."""
    options = {"classes_per_batch": 1, "binarization": "none"}
    folder = make_run(tmp_path / "run", digits.test_images[:2], **options)
    seen = []

    def explain_linen(forward, variables, train, test, **_):
        seen.extend(train)
        raise InterruptedError

    monkeypatch.setattr(evaluation, "explain_linen", explain_linen)
    monkeypatch.setattr(evaluation, "make_score", lambda *_: lambda _: None)
    with pytest.raises(InterruptedError):
        next(evaluation.explain_run(RunFolder(folder)))
    assert len(seen) == 12
    # Class k lights rows 4 + 2k and 5 + 2k.
    classes = [np.asarray(x)[:, 4:24].reshape(20, 10, -1).min(-1).argmax(-1) for x in seen]
    assert all(len({*some.tolist()}) == 1 for some in classes)
    assert len({some[0] for some in classes}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cnn", "tower"])
def test_convolutional_networks(model, tmp_path, main, capsys, digits):
    folder = make_run(tmp_path / "run", digits.test_images[:2], model=model, filters=2)
    assert main("explain", folder) == 0
    out = capsys.readouterr().out
    assert out.startswith("with batch norm\n\nlayer")
    assert "never updated (all layers)" in out
    assert (folder / "explain.png").stat().st_size > 10_000
