"""What a run remembers: as its layers would, and by any number of averages at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.build import build_model
from bn_jax.train.config import TrainConfig
from bn_jax.train.evaluation import evaluate_run
from bn_jax.train.loop import train
from bn_jax.train.run_folder import RunFolder
from bn_jax.train.state import init_runs, init_state
from bn_jax.train.step import binarize, make_train_step
from tests.train.test_experiment import records

pytestmark = pytest.mark.usefixtures("lenient")

SMALL = {"hidden": (8, 5), "batch_size": 20, "steps": 6, "evaluate_every": 3}
DECAYS = (0.5, 0.9, 0.99)


@pytest.mark.parametrize(
    "options",
    [
        {"average": "ema", "decay": 0.7},
        {"average": "cumulative", "placement": "input"},
        {"renorm": (3.0, 5.0)},
        {"group_size": 5},
        {"model": "cnn", "hidden": (100, 100, 100), "filters": 2},
    ],
    ids=str,
)
def test_a_step_remembers_what_the_layers_would(options, digits):
    config = TrainConfig(**SMALL | options)
    images, labels = digits.train_images[:20], jnp.asarray(digits.train_labels[:20], jnp.int32)
    model = build_model(config, "batch")

    @jax.jit
    def both(state):
        inputs = binarize(images, "threshold", state.key)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        _, updates = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return make_train_step(config, "batch")(state, images, labels)[0], updates["batch_stats"]

    state = init_state(config, "batch", images)
    for _ in range(2):
        state, expected = both(state)
        # In groups, the moments of the whole are merged, or measured: they differ by rounding.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            *(state.batch_stats, expected),
        )


@pytest.mark.slow
def test_several_averages_of_one_run_are_those_of_several_runs(digits):
    together = list(train(TrainConfig(**SMALL, decay=DECAYS), "batch", digits))
    for number, decay in enumerate(DECAYS):
        alone = list(train(TrainConfig(**SMALL, decay=decay), "batch", digits))
        for (progress, evaluations), (own, (expected,)) in zip(together, alone, strict=True):
            got = evaluations[number]
            assert (got.cell, got.step) == (number, expected.step)
            assert got.train_loss == pytest.approx(expected.train_loss, rel=1e-6, nan_ok=True)
            assert got.test_accuracy == pytest.approx(expected.test_accuracy, abs=0.011)  # an image
            mine = jax.tree.map(lambda leaf, n=number: leaf[n], progress.state.batch_stats)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                *((progress.state.params, mine), (own.state.params, own.state.batch_stats)),
            )


def multiplications(config, images, labels):
    """The matrix products of a step, as traced: their shapes."""
    state = init_runs(config, "batch", images)
    step = make_train_step(config, "batch")
    text = str(jax.make_jaxpr(step)(state, images, labels))
    return sorted(
        line.split("=")[0].split(":")[1] for line in text.splitlines() if "dot_gen" in line
    )


def test_several_averages_cost_no_more_than_one(digits):
    """The products are as many and as large."""
    batch = digits.train_images[:20], jnp.asarray(digits.train_labels[:20], jnp.int32)
    one, several = (TrainConfig(**SMALL, decay=decay) for decay in (0.9, DECAYS))
    assert len(multiplications(one, *batch)) == 8  # three layers; two for inputs' gradients
    assert multiplications(several, *batch) == multiplications(one, *batch)


@pytest.mark.slow
def test_rows_of_the_table(main, tmp_path, on_digits, capsys):
    """With two seeds, and without batch norm too, where all are one."""
    options = ("--hidden", 8, "--batch-size", 20, "--steps", 4, "--evaluate-every", 4)
    options += ("--decay", 0.5, 0.99, "--seeds", 2, "--run-dir", tmp_path / "run")
    assert main("train", *options) == 0
    out = capsys.readouterr().out
    assert "│ 0.5   │" in out
    assert "│ 0.99  │" in out
    found = [(x["arm"], x["decay"], x["seed"]) for x in records(tmp_path / "run") if x["step"]]
    expected = [
        (arm, decay, seed) for arm in ("batch", "none") for seed in (0, 1) for decay in (0.5, 0.99)
    ]
    assert found == expected
    rows = evaluate_run(RunFolder(tmp_path / "run"))
    assert [(row["arm"], row["decay"]) for row in rows] == [
        (arm, decay) for arm in ("batch", "none") for decay in (0.5, 0.99)
    ]
    assert rows[2]["seeds"] == rows[3]["seeds"]


@pytest.mark.slow
def test_renorm_without_limits_to_correct_is_batch_norm(digits):
    """And with them it is not."""
    ends = [
        list(train(TrainConfig(**SMALL, renorm=renorm), "batch", digits))[-1][0].state.params
        for renorm in (None, (1.0, 0.0), (3.0, 5.0))
    ]
    plain, without, corrected = (jax.tree.leaves(end) for end in ends)
    for a, b in zip(plain, without, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(plain, corrected, strict=True)) > 1e-3


@pytest.mark.slow
def test_evaluations_by_other_statistics(digits):
    """An average that keeps nothing of the data is of no use; the population is."""
    options = SMALL | {"average": "ema", "decay": 1.0, "steps": 60, "evaluate_every": 60}
    options |= {"learning_rate": 1.0}
    configs = [
        TrainConfig(**options, statistics=kind) for kind in ("running", "population", "batch")
    ]
    ends = [list(train(config, "batch", digits))[-1][1] for config in configs]
    scores = [evaluation.test_accuracy for (evaluation,) in ends]
    assert scores[0] < 0.5
    assert min(scores[1:]) > scores[0] + 0.2
