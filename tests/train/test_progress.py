"""A bad step does no lasting harm: nothing of it stays, it is counted, and too many end the arm."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.train import loop, state, step
from bn_jax.train.batches import batch_indices
from bn_jax.train.build import build_optimizer
from bn_jax.train.config import TrainConfig
from bn_jax.train.evaluation import evaluate_run
from bn_jax.train.experiment import Diverged, run_experiment
from bn_jax.train.loop import run_chunk, train
from bn_jax.train.progress import begin, careful, is_finite, trusting
from bn_jax.train.run_folder import RunFolder
from bn_jax.train.state import init_state
from bn_jax.train.step import cross_entropy, make_train_step, passes
from tests.train.test_experiment import quiet, records

pytestmark = pytest.mark.usefixtures("lenient")

SMALL = {"hidden": (8,), "batch_size": 20, "norm": "batch", "steps": 12, "evaluate_every": 4}
CONFIG = TrainConfig(**SMALL)
NAN = jnp.float32(np.nan)


def parts(arm="batch", **options):
    return TrainConfig(**SMALL | options), arm


def leaves(state):
    return jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))


def assert_same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def spoiled(parts, bad, value=NAN):
    """The loss of some steps, and with it every gradient, is not finite."""

    def spoil(model, state, *batch):
        factor = jnp.where(jnp.isin(state.step, jnp.array(bad)), value, 1)
        # As NaN in a batch has it: all of them.
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), passes(model, state, *batch))

    return make_train_step(*parts, passes=spoil)


def spoiled_gradient(parts, bad, value=jnp.inf):
    """One number of one gradient is infinite; the loss is good."""

    def spoil(model, state, *batch):
        found = passes(model, state, *batch)
        factor = jnp.where(jnp.isin(state.step, jnp.array(bad)), value, 1)
        kernel = found.grads["Dense_0"]["kernel"]
        found.grads["Dense_0"]["kernel"] = kernel.at[0, 0].multiply(factor)
        return found

    return make_train_step(*parts, passes=spoil)


def spoiled_labels(parts, bad):
    """A label that is no class gives the loss NaN."""
    step = make_train_step(*parts)

    def take(state, images, labels):
        is_bad = jnp.isin(state.step, jnp.array(bad))
        return step(state, images, jnp.where(is_bad, labels.at[3].set(77), labels))

    return take


@pytest.mark.parametrize(
    ("spoil", "optimizer"),
    [(spoiled, "sgd"), (spoiled_gradient, "adam"), (spoiled_labels, "momentum")],
)
def test_a_bad_step_is_as_if_its_batch_had_not_been(spoil, optimizer, digits):
    """Steps 2 and 5 of 9 leave the state as it was, but for the count of steps."""
    network = parts(optimizer=optimizer)
    data = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels, jnp.int32)
    start = init_state(*network, data[0][:2])
    bad = [2, 5]
    chunk = {"steps": 9, "batch_size": 20}
    _, finite = run_chunk(spoil(network, bad), begin(start), *data, **chunk)
    assert not finite  # which the loop is told, to take these steps again with care
    got, finite = run_chunk(spoil(network, bad), begin(start), *data, **chunk, take=careful(5))
    assert finite
    assert (got.step, int(got.good), int(got.bad), int(got.in_a_row)) == (9, 7, 2, 0)

    step, state, losses = jax.jit(make_train_step(*network)), start, 0.0
    for number, rows in enumerate(batch_indices(start.key, start.step, 9, 20, 240)):
        if number in bad:
            state = state._replace(step=state.step + 1)
            continue
        state, loss = step(state, *(a[rows] for a in data))
        losses += float(loss)
    assert float(got.loss) == pytest.approx(losses, rel=1e-5)
    for x, y in zip(leaves(got.state), leaves(state), strict=True):
        # Seven steps, each of which may round otherwise when compiled otherwise.
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_bad_steps_in_a_row_across_calls_end_it(digits):
    """At the third nothing moves any more, not even the count, whatever comes then."""
    network = parts()
    data = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels, jnp.int32)
    start = begin(init_state(*network, data[0][:2]))
    options = {"steps": 4, "batch_size": 20, "take": careful(3)}
    step = spoiled(network, [3, 4, 5])
    first, _ = run_chunk(step, start, *data, **options)
    assert (int(first.in_a_row), first.diverged(3).tolist()) == (1, False)
    first = first.reported()
    assert (int(first.bad), int(first.in_a_row)) == (0, 1)
    assert first.was_bad
    second, _ = run_chunk(step, first, *data, **options)
    assert (second.step, int(second.bad), second.diverged(3).tolist()) == (6, 2, True)
    assert_same(second.state._replace(step=first.state.step), first.state)
    third, _ = run_chunk(step, second, *data, **options)
    assert_same(third.state, second.state)
    assert third[1:] == second[1:]


def test_what_is_finite():
    good = {"a": jnp.ones(3), "b": jnp.int32(4), "key": jax.random.key(0)}
    assert is_finite(good)
    for value in (np.nan, np.inf, -np.inf):
        assert not is_finite(good | {"a": jnp.ones(3).at[1].set(value)})


def test_optax_looks_after_its_own_part(digits, monkeypatch):
    """With `apply_if_finite` inside of the optimizer, a bad loss still undoes the statistics."""
    network = parts()
    for module in (state, step):
        monkeypatch.setattr(
            module,
            "build_optimizer",
            lambda config: optax.apply_if_finite(build_optimizer(config), 2),
        )
    data = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels, jnp.int32)
    start = begin(init_state(*network, data[0][:2]))
    got, finite = run_chunk(
        spoiled(network, [1, 2, 3, 4]), start, *data, steps=6, batch_size=20, take=careful(9)
    )
    assert finite
    assert (int(got.good), int(got.bad)) == (2, 4)
    assert is_finite(got)


@pytest.fixture
def spoil(monkeypatch):
    """From now on, these steps of training are bad."""

    def spoil(*bad):
        def make(config, arm, *_):
            return spoiled((config, arm), bad)

        monkeypatch.setattr(loop, "make_train_step", make)

    return spoil


def test_the_loop_takes_steps_again_with_care(digits, spoil, monkeypatch):
    """Only from a bad one on, and until an evaluation without one."""
    taken = []
    make = loop.run_chunk.lower

    class Recorder:
        @staticmethod
        def lower(*args, **options):
            taken.append((options["steps"], options["take"] is trusting))
            return make(*args, **options)

    monkeypatch.setattr(loop, "run_chunk", Recorder)
    spoil(5)
    calls = list(train(CONFIG, "batch", digits))
    assert taken == [(4, True), (4, False)]  # each compiled once
    evaluations = [evaluation for _, some in calls for evaluation in some]
    assert [e.bad_steps for e in evaluations] == [0, 0, 1, 0]
    assert not any(e.diverged for e in evaluations)
    assert all(np.isfinite(e.train_loss) for e in evaluations[1:])
    spoil()
    progress, (evaluation,) = list(train(CONFIG, "batch", digits))[-1]
    # As a step is missing, but one of twelve.
    assert abs(evaluation.train_loss - evaluations[-1].train_loss) < 0.3
    assert is_finite(progress)


def test_a_diverged_arm_is_called_so(digits, spoil, tmp_path, on_digits):
    """In the table, the summary and the metrics; the last good network is what is kept."""
    spoil(*range(6, 12))
    config = TrainConfig(**SMALL | {"max_bad_steps": 3, "run_dir": tmp_path / "run"})
    console = quiet()
    with pytest.raises(
        Diverged, match=r"^diverged: the network with batch norm at step 9, after 3 steps in a"
    ):
        run_experiment(config, console)
    text = console.file.getvalue()
    assert "│ diverged │         3 │" in text
    lines = records(tmp_path / "run")
    assert [(x["step"], x["bad_steps"], x["diverged"]) for x in lines] == [
        (0, 0, False),
        (4, 0, False),
        (8, 2, False),
        (9, 1, True),
    ]
    arm = json.loads((tmp_path / "run" / "summary.json").read_text())["arms"]["batch"]
    assert (arm["diverged"], arm["bad_steps"], arm["steps"]) == (True, 3, 9)
    (row,) = evaluate_run(RunFolder(tmp_path / "run"))
    assert row == {"arm": "batch", "step": 9, "test_accuracy": arm["final_test_accuracy"]}


def test_the_other_arm_goes_on_and_the_status_is_1(main, tmp_path, on_digits, capsys):
    """At a rate without measure, nothing survives; each arm says so."""
    options = ("--hidden", 8, "--batch-size", 20, "--steps", 40, "--activation", "relu")
    options += ("--evaluate-every", 20, "--learning-rate", 1e30, "--max-bad-steps", 4)
    assert main("train", *options, "--run-dir", tmp_path / "run") == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: diverged: ")
    assert " the network without batch norm at step " in err
    assert err.count("\n") == 1
    assert "diverged" in out
    assert {line["arm"] for line in records(tmp_path / "run")} == {"batch", "none"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"summary.json", "curves.png", "checkpoints"} <= names


def test_no_class_has_no_loss():
    """What spoils a label here spoils the loss."""
    assert np.isnan(cross_entropy(jnp.zeros((2, 10)), jnp.array([1, 77])))
