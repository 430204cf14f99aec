"""A grid in one compiled program: each cell is its separate run, and nothing is lost on the way."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from bn_jax.train import loop
from bn_jax.train.config import TrainConfig
from bn_jax.train.display import grid_table
from bn_jax.train.evaluation import evaluate_run
from bn_jax.train.experiment import Interrupted, run_experiment
from bn_jax.train.loop import train
from bn_jax.train.run_folder import RunFolder
from tests.train.test_experiment import quiet, records
from tests.train.test_resume import assert_same_end, lines, stop_after

pytestmark = pytest.mark.usefixtures("lenient")
stop_after = stop_after

SMALL = {"hidden": (8,), "batch_size": 20, "steps": 6, "evaluate_every": 3, "checkpoint_every": 3}


def calls(data, arm="batch", **options):
    return list(train(TrainConfig(**SMALL | options), arm, data))


@pytest.mark.parametrize(
    ("over", "options"),
    [
        (("learning-rate=0.1,0.5", "epsilon=1e-5,0.1"), {"optimizer": "momentum"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (("decay=0.5,0.99",), {"renorm": (3.0, 5.0), "micro_batches": 2}),
                (("r-max=1,3", "d-max=0,5"), {}),
                (("weight-decay=0,0.5", "learning-rate=0.1"), {"schedule": "cosine"}),
                (("init-std=0.01,0.3", "decay=0.9"), {"optimizer": "adam"}),
            ]
        ),
    ],
    ids=lambda value: "-".join(value).replace("=", ":") if isinstance(value, tuple) else "",
)
def test_a_cell_is_its_separate_run(over, options, digits):
    """The last of them, with the last seed."""
    config = TrainConfig(**SMALL, **options, over=over, seeds=2)
    grid = list(train(config, "batch", digits))
    alone = list(train(config.runs[-1], "batch", digits))
    assert len(grid[0][1]) == len(config.names)
    for (progress, evaluations), (own, (expected,)) in zip(grid, alone, strict=True):
        got = evaluations[-1]
        assert (got.step, got.seed, got.cell) == (expected.step, 1, len(config.grid) - 1)
        # Six steps, each of which rounds in another order; the variance of the pre-activations
        # is up to a hundred. A cell with another value is further away than that.
        assert got.train_loss == pytest.approx(expected.train_loss, abs=1e-5, nan_ok=True)
        trees = [(p.state.params, p.state.batch_stats) for p in (progress, own)]
        for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(a[-1], b, rtol=1e-4, atol=1e-5)
    assert abs(evaluations[0].train_loss - got.train_loss) > 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    """A grid of 2 arms × 2 rates × 2 deviations × 2 seeds; at one rate, nothing stays finite."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    over = ("learning-rate=1e30,0.5", "init-std=0.1,0.3")
    options = SMALL | {"seeds": 2, "max_bad_steps": 2, "activation": "relu", "run_dir": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bn_jax.train.experiment.load", lambda *_, **__: digits)
        run_experiment(TrainConfig(**options, over=over), quiet())
    return folder


def test_a_row_per_arm_and_combination(folder):
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = ["arm", "learning_rate", "init_std"]
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (arm, rate, std)
        for arm in ("batch", "none")
        for rate in ("1e+30", "0.5")
        for std in ("0.1", "0.3")
    ]
    same = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    assert json.loads((folder / "summary.json").read_text())["rows"] == same
    for row, other in zip(rows, same, strict=True):
        assert {k: "" if v is None else str(v) for k, v in other.items()} == row
    assert [row["diverged"] for row in same[4:]] == [2, 2, 0, 0]  # of two seeds


def test_the_metrics_say_of_which_cell_they_are(folder):
    found = records(folder)
    for row in map(json.loads, (folder / "sweep.jsonl").read_text().splitlines()):
        ends = [
            [x["test_accuracy"] for x in found if all(x[k] == v for k, v in names.items())][-1]
            for seed in (0, 1)
            for names in [
                {k: row[k] for k in ("arm", "learning_rate", "init_std")} | {"seed": seed}
            ]
        ]
        assert row["final_test_accuracy"] == pytest.approx(np.mean(ends))


def test_the_table_and_the_picture(folder):
    rows = list(map(json.loads, (folder / "sweep.jsonl").read_text().splitlines()))
    config = TrainConfig.from_json((folder / "config.json").read_text())
    console = quiet()
    console.print(grid_table(rows, config))
    text = console.file.getvalue()
    assert text.count("diverged") >= 2
    assert "learning-rate" in text
    with Image.open(folder / "curves.png") as image:
        assert image.size[0] > 1000  # two panels


def test_every_cell_is_scored_again(folder, on_digits):
    rows = map(json.loads, (folder / "sweep.jsonl").read_text().splitlines())
    scored = evaluate_run(RunFolder(folder))
    assert len(scored) == 8
    for row, again in zip(rows, scored, strict=True):
        assert all(row[name] == again[name] for name in ("arm", "learning_rate", "init_std"))
        if not row["diverged"]:
            assert row["final_test_accuracy"] == pytest.approx(again["test_accuracy"])
            assert len(again["seeds"]) == 2


@pytest.mark.slow
def test_a_grid_goes_on_to_the_byte(folder, tmp_path, on_digits, stop_after, monkeypatch):
    monkeypatch.setattr(loop, "steps_per_call", lambda *_: 8)  # two steps of four runs
    options = SMALL | {"seeds": 2, "norm": "batch"}
    options |= {"over": ("decay=0.5,0.9", "epsilon=1e-5,0.1")}
    whole, parts = (TrainConfig(run_dir=tmp_path / name, **options) for name in ("whole", "parts"))
    run_experiment(whole, quiet())
    stop_after(2)
    with pytest.raises(Interrupted, match="stopped at step 1 of the network with batch norm"):
        run_experiment(parts, quiet())
    stop_after(100)
    run_experiment(parts, quiet(), resume=tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert lines(tmp_path / "parts")[0]["decay"] == 0.5
    tables = [(tmp_path / name / "sweep.csv").read_text() for name in ("whole", "parts")]
    assert len(tables[0].splitlines()) == len(tables[1].splitlines()) == 1 + 4


def test_the_command(main, tmp_path, on_digits, capsys):
    options = ("--over", "epsilon=1e-5,0.1", "--norm", "batch", "--hidden", 8, "--batch-size", 20)
    options += ("--steps", 2, "--evaluate-every", 2, "--run-dir", tmp_path / "run")
    assert main("sweep", *options) == 0
    out = capsys.readouterr().out
    assert "│ 1e-05   │" in out
