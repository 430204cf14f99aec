"""Chunks of steps under `lax.scan` are the steps one by one, wherever the chunks end."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.batches import batch_indices
from bn_jax.train.chunks import STEPS, next_call, split, steps_per_call
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import run_chunk, train
from bn_jax.train.progress import begin, careful, trusting
from bn_jax.train.scoring import make_score
from bn_jax.train.state import init_state
from bn_jax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("lenient")

SMALL = {"hidden": (8,), "learning_rate": 0.5, "batch_size": 20, "steps": 10}
CONFIG = TrainConfig(**SMALL)


def run(data, arm="batch", **options):
    """All (state, evaluation) of a run."""
    config = TrainConfig(**SMALL | {"evaluate_every": 10} | options)
    calls = train(config, arm, data)
    return [(progress.state, *evaluations) for progress, evaluations in calls if evaluations]


@pytest.fixture(scope="module")
def known():
    """Runs that more than one test looks at."""
    return {}


@pytest.fixture
def in_one_go(known, digits):
    """The run whose only chunk is all of it."""
    return known.get(10) or known.setdefault(10, run(digits))


@pytest.fixture
def in_chunks(known, digits):
    """The same run in chunks of 4, 4 and 2 steps."""
    return known.get(4) or known.setdefault(4, run(digits, evaluate_every=4))


def leaves(state):
    return jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))


def test_evaluations_before_the_first_step_and_after_each_chunk(in_chunks, digits):
    states, evaluations = zip(*in_chunks, strict=True)
    assert [e.step for e in evaluations] == [0, 4, 8, 10]
    assert [int(state.step) for state in states] == [0, 4, 8, 10]
    first, *rest = evaluations
    assert np.isnan(first.train_loss)
    assert first.examples_per_second == 0
    assert all(e.examples_per_second > 0 for e in rest)
    score = make_score(CONFIG, "batch", digits)
    for state, evaluation in zip(states, evaluations, strict=True):
        assert evaluation.test_accuracy == score(state).item()


@pytest.mark.parametrize("arm", ["batch", "none"])
def test_it_learns(arm, digits):
    (_, start), *_, (_, end) = run(digits, arm, steps=200, evaluate_every=100, learning_rate=1.0)
    assert start.test_accuracy < 0.4
    assert end.test_accuracy > 0.9


@pytest.mark.parametrize(("arm", "binarization"), [("batch", "stochastic"), ("none", "threshold")])
def test_a_chunk_is_its_steps_one_by_one(arm, binarization, digits):
    config = dataclasses.replace(CONFIG, binarization=binarization)
    images = jnp.asarray(digits.train_images)
    labels = jnp.asarray(digits.train_labels, jnp.int32)
    train_step = make_train_step(config, arm)
    state = start = init_state(config, arm, images[:2])
    step, losses = jax.jit(train_step), []
    # 15 steps of 20 span two epochs of 240.
    rows = batch_indices(start.key, start.step, 15, 20, len(images))
    for batch in rows:
        state, loss = step(state, images[batch], labels[batch])
        losses.append(float(loss))
    for take in (trusting, careful(1)):
        chunk, finite = run_chunk(
            train_step, begin(start), images, labels, steps=15, batch_size=20, take=take
        )
        assert bool(finite)
        assert (chunk.step, int(chunk.good), int(chunk.bad)) == (15, 15, 0)
        assert float(chunk.loss) == pytest.approx(np.sum(losses), rel=1e-5)
        # Fifteen steps, each of which may round otherwise when compiled otherwise.
        for got, expected in zip(leaves(chunk.state), leaves(state), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_when_to_evaluate_changes_nothing(in_chunks, in_one_go):
    for x, y in zip(leaves(in_chunks[-1][0]), leaves(in_one_go[-1][0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_seed_is_a_run(in_one_go, digits):
    (first, one), (again, two), (other, three) = (
        in_one_go[-1],
        run(digits, seed=0)[-1],
        run(digits, seed=1)[-1],
    )
    for x, y in zip(leaves(first), leaves(again), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)
    assert one._replace(examples_per_second=0) == two._replace(examples_per_second=0)
    assert one.train_loss != three.train_loss
    kernels = [s.params["NormalizedLayer_0"]["Dense_0"]["kernel"] for s in (first, other)]
    assert np.any(kernels[0] != kernels[1])


def test_the_seed_is_that_of_initial_weights_and_of_the_order(digits):
    configs = [dataclasses.replace(CONFIG, seed=seed) for seed in (0, 1)]
    states = [init_state(config, "batch", digits.train_images[:2]) for config in configs]
    a, b = (state.params["Dense_0"]["kernel"] for state in states)
    assert np.any(a != b)
    a, b = (batch_indices(state.key, state.step, 3, 20, 240) for state in states)
    assert np.any(a != b)


def test_both_arms_see_the_same_batches(digits):
    keys = [run(digits, arm, steps=0)[0][0].key for arm in ("batch", "none")]
    assert keys[0] == keys[1]


def test_a_batch_larger_than_the_data(digits):
    config = TrainConfig(batch_size=241)
    with pytest.raises(ValueError, match=r"--batch-size 241: must be at most 240"):
        next(train(config, "none", digits))


def test_batches_of_two_classes(digits, monkeypatch):
    """Of each equally many; groups of a batch have the same ones. Other steps, other ones."""
    seen = []

    def make(*_):
        def step(state, images, labels):
            jax.debug.callback(lambda labels: seen.append(labels.tolist()), labels, ordered=True)
            return state._replace(step=state.step + 1), jnp.float32(0)

        return step

    monkeypatch.setattr("bn_jax.train.loop.make_train_step", make)
    monkeypatch.setattr("bn_jax.train.loop.steps_per_call", lambda *_: 10)
    run(digits, classes_per_batch=2)
    jax.effects_barrier()
    assert len(seen) == 10
    for labels in seen:
        assert np.unique(labels, return_counts=True)[1].tolist() == [10, 10]
        assert len({*labels[:2]}) == 2
    assert len({frozenset(labels) for labels in seen}) > 2


def test_more_classes_than_there_are(digits):
    config = TrainConfig(batch_size=20, classes_per_batch=20)
    with pytest.raises(ValueError, match=r"^--classes-per-batch 20: must be at most 10, the numb"):
        next(train(config, "none", digits))


def test_a_batch_of_all_the_data(digits):
    *_, (state, evaluation) = run(digits, batch_size=240, steps=2, evaluate_every=2)
    assert int(state.step) == evaluation.step == 2


def test_a_long_run_is_many_short_calls(digits, monkeypatch):
    """Of 10 steps between evaluations at most 3 at once, and what is done is told before."""
    expected = run(digits, steps=14, evaluate_every=10)
    monkeypatch.setattr("bn_jax.train.loop.steps_per_call", lambda *_: 3)
    # A clock by which each call takes a second.
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("bn_jax.train.loop.time", clock)
    config, told = TrainConfig(**SMALL | {"steps": 14, "evaluate_every": 10}), []
    calls = list(train(config, "batch", digits, lambda *what: told.append(what)))
    assert [progress.step for progress, _ in calls] == [0, 2, 4, 6, 8, 10, 12, 14]
    got = [(progress.state, *evaluations) for progress, evaluations in calls if evaluations]
    assert told == [
        ("compiling", 0),
        *(("compiling", 0), *(("training", step) for step in range(0, 10, 2)), ("evaluating", 10)),
        *(("training", 10), ("training", 12), ("evaluating", 14)),
    ]
    # 5 calls of 2 steps of 20 examples, then 2.
    assert [e.examples_per_second for _, e in got] == [0, 40, 40]
    for (state, evaluation), (other, whole) in zip(got, expected, strict=True):
        for x, y in zip(leaves(state), leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        a, b = (e._replace(train_loss=0, examples_per_second=0) for e in (evaluation, whole))
        assert a == b
        assert evaluation.train_loss == pytest.approx(whole.train_loss, rel=1e-6, nan_ok=True)


def test_a_call_has_as_many_steps_as_its_time_allows():
    """By the network's work: 2·2·60·784·n operations for a layer of n features, and a few more."""

    def size(**options):
        config = TrainConfig(**options)
        images = np.zeros((config.batch_size, 28, 28), np.uint8)
        state = init_state(config, "batch", images[:1])
        return steps_per_call(make_train_step(config, "batch"), state, images)

    assert size(hidden=(1,)) == STEPS
    wide = 2e10 / (2 * 2 * 60 * 784 * 1000)
    assert 0.5 * wide < size(hidden=(1000,)) < wide
    assert size(hidden=(1000,), batch_size=60_000) == 1


@pytest.mark.parametrize(
    ("steps", "most", "sizes"),
    [
        (10, 10, [10]),
        (10, 100, [10]),
        (10, 9, [5, 5]),
        (10, 1, [1] * 10),
        (500, 185, [125] * 4),
        (7, 3, [3, 2, 2]),
        (1, 1, [1]),
    ],
)
def test_steps_as_calls_of_few_sizes(steps, most, sizes):
    assert split(steps, most) == sizes


@pytest.mark.parametrize(
    ("every", "most", "ends"),
    [(10, 4, [*range(2, 21, 2), 23, 25]), (10, 10, [10, 20, 25]), (100, 9, [5, 10, 15, 20, 25])],
)
def test_calls_from_any_of_their_ends_on(every, most, ends):
    """And from elsewhere, as after calls of other sizes: to the next end."""
    assert [next_call(step, 25, every, most) for step in [0, *ends[:-1]]] == np.diff(
        [0, *ends]
    ).tolist()
    assert next_call(ends[0] - 1, 25, every, most) == 1
