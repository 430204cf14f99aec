"""The loops of the training benchmark train, and train the same networks."""

import math

import jax
import numpy as np
import pytest

from bn_jax.bench import train_step
from bn_jax.data import Dataset
from bn_jax.train.config import TrainConfig
from bn_jax.train.state import init_state

MODELS = ("mlp", pytest.param("cnn", marks=pytest.mark.slow), "tower")
CONFIGS = {
    "mlp": TrainConfig(hidden=(8, 5)),
    "cnn": TrainConfig(model="cnn", filters=2),
    "tower": TrainConfig(model="tower", filters=2, blocks=1),
}


def draw(count):
    """Images of noise."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 28, 28), np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    return Dataset(images, labels, images, labels)


def test_every_loop_that_can_run_has_its_turns(lenient, monkeypatch):
    steps = []

    def loop(config, data, count):
        return lambda: steps.append(count)

    for name in ("scanned", "step_by_step", "torch_eager"):
        monkeypatch.setattr(train_step, name, loop)
    monkeypatch.setattr(train_step, "in_our_loop", lambda _, *arguments: loop(*arguments))
    for found in (None, object()):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=found: found)
        timings = train_step.measure(TrainConfig(), draw(1), steps=4, turns=2)
        names = [train_step.OURS, train_step.THEIRS, *train_step.IN_OUR_LOOP, train_step.TORCH]
        assert list(timings) == (names if found else names[:-1])
        assert all(len(timing.seconds) == 2 for timing in timings.values())
    assert steps == [4] * 39  # a turn that does not count, and two that do


@pytest.mark.parametrize("model", MODELS)
def test_both_loops_update_the_same_network(model, lenient):
    """What is timed is the same work: equally many parameters, all of them moved."""
    data, sizes = draw(120), {}
    for build in (train_step.scanned, train_step.step_by_step):
        run = build(CONFIGS[model], data, 1)
        cell = dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))["state"]
        before = jax.tree.map(np.array, cell.cell_contents[0])
        run()
        after = cell.cell_contents[0]
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert all(jax.tree.leaves(moved))
        sizes[build.__name__] = sum(a.size for a in jax.tree.leaves(after))
    assert sizes["scanned"] == sizes["step_by_step"]


@pytest.mark.slow
def test_in_our_loop_only_the_batch_norm_differs(lenient):
    """Ours and flax's learn the same; without, there is no scale, but a bias per layer."""
    sizes, ends = {}, {}
    for name, normalization in train_step.IN_OUR_LOOP.items():
        run = train_step.in_our_loop(normalization, CONFIGS["mlp"], draw(120), 3)
        run()
        (state,) = (
            cell.cell_contents
            for name, cell in zip(run.__code__.co_freevars, run.__closure__, strict=True)
            if name == "state"
        )
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        ends[name] = state
    none, *others = train_step.IN_OUR_LOOP
    assert {sizes[name] - sizes[none] for name in others} == {8 + 5}
    assert int(ends[none].step) == 3
    for name in others[1:]:
        # Three steps, each of which rounds otherwise.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            *((ends[n].params, ends[n].batch_stats) for n in (others[0], name)),
        )


@pytest.mark.peer
@pytest.mark.parametrize("model", CONFIGS)
def test_torch_trains_the_same_network(model):
    torch = pytest.importorskip("torch")
    config = CONFIGS[model]
    images = np.zeros((2, 28, 28), np.uint8)
    ours = jax.eval_shape(lambda: init_state(config, "batch", images))
    theirs = train_step.torch_network(torch, config)
    logits = theirs(torch.zeros(2, 28, 28))
    assert logits.shape == (2, 10)

    def sizes(leaves):
        return sorted(math.prod(leaf.shape) for leaf in leaves)

    assert sizes(theirs.parameters()) == sizes(jax.tree.leaves(ours.params))
    train_step.torch_eager(config, draw(120), 2)()
