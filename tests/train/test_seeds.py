"""Several seeds in one compiled program: each is its separate run, and results are means."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from bn_jax.train import loop
from bn_jax.train.config import TrainConfig
from bn_jax.train.display import plot_curves
from bn_jax.train.evaluation import evaluate_run
from bn_jax.train.experiment import Diverged, Interrupted, run_experiment
from bn_jax.train.loop import Evaluation, train
from bn_jax.train.summary import estimate, summarize
from tests.train.test_experiment import quiet, records
from tests.train.test_progress import spoiled
from tests.train.test_resume import assert_same_end, stop_after

pytestmark = pytest.mark.usefixtures("lenient")
stop_after = stop_after

SMALL = {"hidden": (8,), "batch_size": 20, "steps": 6, "evaluate_every": 3, "checkpoint_every": 3}


def run(folder, resume=False, **options):
    config = TrainConfig(run_dir=folder, **SMALL | options)
    return run_experiment(config, quiet(), resume=folder if resume else None)


def calls(data, arm="batch", **options):
    config = TrainConfig(**SMALL | options)
    return list(train(config, arm, data))


def leaves(progress):
    return jax.tree.leaves((progress.state.params, progress.state.batch_stats))


@pytest.mark.parametrize(
    ("arm", "options"),
    [
        ("batch", {"optimizer": "momentum", "binarization": "stochastic"}),
        ("batch", {"devices": 4, "micro_batches": 5}),
        pytest.param("batch", {"devices": 2}, marks=pytest.mark.slow),
        pytest.param("none", {}, marks=pytest.mark.slow),
        pytest.param(
            "batch", {"model": "cnn", "hidden": (100,), "filters": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=["mlp", "devices", "a device each", "without", "cnn"],
)
def test_each_seed_is_its_separate_run(arm, options, digits):
    """Its own weights, batches and draws; equal but for rounding."""
    together = calls(digits, arm, seed=3, seeds=2, **options)
    alone = calls(digits, arm, seed=4, **options | {"devices": None})
    assert [e.seed for e in together[0][1]] == [3, 4]
    for (progress, (_, got)), (own, (expected,)) in zip(together, alone, strict=True):
        assert (got.seed, got.step) == (expected.seed, expected.step)
        assert got.test_accuracy == pytest.approx(expected.test_accuracy, abs=0.011)  # one image
        # Each step sums in another order, with 2⁻²⁴ of rounding per term; of six steps, each of
        # which goes on from the other's digits, a few times 1e-6 remain.
        assert got.train_loss == pytest.approx(expected.train_loss, abs=1e-5, nan_ok=True)
        for a, b in zip(leaves(progress), leaves(own), strict=True):
            np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_hundred_steps_of_the_papers_network(digits):
    """As users compile it; nothing drifts apart in a hundred steps."""
    options = {"hidden": (100, 100, 100), "batch_size": 60, "steps": 100, "evaluate_every": 50}
    (*_, (progress, _)) = calls(digits, seeds=5, **options)
    for seed in (0, 4):
        (*_, (own, _)) = calls(digits, seed=seed, **options)
        for a, b in zip(leaves(progress), leaves(own), strict=True):
            np.testing.assert_allclose(a[seed], b, atol=2e-5)


def test_a_run_of_two_seeds(tmp_path, on_digits):
    """A line per seed, one checkpoint; means and intervals in the summary and the evaluation."""
    folder = run(tmp_path / "run", seeds=2, seed=5)
    lines = records(folder.path)
    assert [(x["arm"], x["step"], x["seed"]) for x in lines] == [
        (arm, step, seed) for arm in ("batch", "none") for step in (0, 3, 6) for seed in (5, 6)
    ]
    summary = json.loads((folder.path / "summary.json").read_text())
    for row in evaluate_run(folder):
        arm = row["arm"]
        finals = [x["test_accuracy"] for x in lines if (x["arm"], x["step"]) == (arm, 6)]
        assert row["seeds"] == finals
        assert (
            summary["arms"][arm]["final_test_accuracy"] == row["test_accuracy"] == np.mean(finals)
        )
        assert summary["arms"][arm]["plus_or_minus"]["final_test_accuracy"] == row["plus_or_minus"]
        assert [s["final_test_accuracy"] for s in summary["arms"][arm]["seeds"].values()] == finals
    assert (folder.path / "curves.png").stat().st_size > 10_000


def test_it_goes_on_to_the_byte(tmp_path, on_digits, stop_after, monkeypatch):
    monkeypatch.setattr(loop, "steps_per_call", lambda *_: 4)  # of one seed; two of two seeds
    options = {"seeds": 2, "norm": "batch"}
    run(tmp_path / "whole", **options)
    stop_after(2)
    with pytest.raises(Interrupted, match="stopped at step 1"):
        run(tmp_path / "parts", **options)
    stop_after(100)
    run(tmp_path / "parts", resume=True, **options)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_one_seed_of_two_diverges(tmp_path, on_digits, monkeypatch):
    """Its last line says so; the other one is trained to the end, and is the mean."""

    def make(config, arm, *_):
        bad = spoiled((config, arm), range(4, 99))
        good = spoiled((config, arm), ())

        def step(state, images, labels):
            key = jax.random.key_data(state.key)
            is_bad = (key == jax.random.key_data(jax.random.split(jax.random.key(1))[1])).all()
            return jax.tree.map(
                lambda a, b: jax.numpy.where(is_bad, a, b),
                bad(state, images, labels),
                good(state, images, labels),
            )

        return step

    monkeypatch.setattr(loop, "make_train_step", make)
    options = {"seeds": 2, "norm": "batch", "max_bad_steps": 2, "steps": 12}
    with pytest.raises(
        Diverged, match=r"^diverged: the network with batch norm, seed 1, at step 6, after 2"
    ):
        run(tmp_path / "run", **options)
    lines = [(x["seed"], x["step"], x["diverged"]) for x in records(tmp_path / "run")]
    assert lines == [
        *[(seed, step, (seed, step) == (1, 6)) for step in (0, 3, 6) for seed in (0, 1)],
        *[(0, 9, False), (0, 12, False)],
    ]
    row = json.loads((tmp_path / "run" / "summary.json").read_text())["arms"]["batch"]
    assert not row["diverged"]
    assert row["final_test_accuracy"] == row["seeds"]["0"]["final_test_accuracy"]
    assert row["seeds"]["1"]["diverged"]
    # And once more, from where all that is known lies in the folder.
    with pytest.raises(Diverged):
        run(tmp_path / "run", resume=True, **options)
    assert [(x["seed"], x["step"], x["diverged"]) for x in records(tmp_path / "run")] == lines


def test_an_interval_is_students():
    values = [0.97, 0.975, 0.98, 0.974]
    mean, half = estimate(values)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert estimate([0.5]) == (0.5, None)
    assert estimate([0.5, None]) == (None, None)


def curve(seed, *accuracies):
    return [Evaluation(100 * n, 1.0, a, 60.0, seed=seed) for n, a in enumerate(accuracies)]


def test_the_summary_of_seeds():
    arm = summarize({"batch": curve(0, 0.1, 0.91, 0.96) + curve(1, 0.1, 0.8, 0.94)})["arms"][
        "batch"
    ]
    assert arm["final_test_accuracy"] == pytest.approx(0.95)
    assert arm["steps_to"] == {"0.90": 150, "0.95": None, "0.97": None}  # one never came to .95
    # Student's t of one degree of freedom, 12.706, times the standard error of .94 and .96.
    assert arm["plus_or_minus"]["final_test_accuracy"] == pytest.approx(12.706 * 0.01, rel=1e-3)
    assert arm["plus_or_minus"]["steps_to"]["0.90"] == pytest.approx(12.706 * 50, rel=1e-3)
    assert arm["seeds"]["1"]["final_test_accuracy"] == 0.94


def in_the_band(png, tmp_path):
    """How many pixels have the color of a band: a quarter of blue on white."""
    (tmp_path / "plot.png").write_bytes(png)
    with Image.open(tmp_path / "plot.png") as image:
        pixels = np.asarray(image.convert("RGB"), int).reshape(-1, 3)
    band = np.array([31, 119, 180]) * 0.25 + 255 * 0.75
    return int(np.sum(np.abs(pixels - band).max(1) < 4))


def test_the_plot_has_a_band_and_the_papers_curves(tmp_path):
    seeds = curve(0, 0.72, 0.9, 0.96) + curve(1, 0.75, 0.85, 0.94) + curve(2, 0.8, 0.9, 0.95)
    short = TrainConfig(seeds=3, norm="batch", steps=200)
    assert in_the_band(plot_curves({"batch": seeds}, short), tmp_path) > 1000
    one = TrainConfig(norm="batch", steps=200)
    assert in_the_band(plot_curves({"batch": seeds[:3]}, one), tmp_path) < 100
    # The paper's curve is behind where its experiment is, as far as the run goes.
    assert plot_curves({"batch": seeds}, short) == plot_curves(
        {"batch": seeds}, dataclasses.replace(short, hidden=(100, 100))
    )
    long = dataclasses.replace(short, steps=50_000)
    assert plot_curves({"batch": seeds}, long) != plot_curves(
        {"batch": seeds}, dataclasses.replace(long, hidden=(100, 100))
    )
