"""A smoke of the training benchmark: both loops train, and alike."""

import jax
import numpy as np

from bn_jax.bench import train_step
from bn_jax.data import Dataset
from bn_jax.train.config import TrainConfig


def test_both_loops_run(lenient):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (240, 28, 28), np.uint8)
    labels = generator.integers(0, 10, 240).astype(np.uint8)
    data = Dataset(images, labels, images, labels)
    timings = train_step.measure(data, steps=4, turns=2)
    assert set(timings) == {train_step.OURS, train_step.THEIRS}
    for timing in timings.values():
        assert len(timing.seconds) == 2
        assert min(timing.seconds) > 0


def test_both_loops_update_the_same_network(lenient):
    """What is timed is the same work: equally many parameters, all of them moved."""
    images = np.random.default_rng(0).integers(0, 256, (120, 28, 28), np.uint8)
    labels = (np.arange(120) % 10).astype(np.uint8)
    data, sizes = Dataset(images, labels, images, labels), {}
    for build in (train_step.scanned, train_step.step_by_step):
        run = build(TrainConfig(), data, 1)
        cell = dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))["state"]
        before = jax.tree.map(np.array, cell.cell_contents[0])
        run()
        after = cell.cell_contents[0]
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert all(jax.tree.leaves(moved))
        sizes[build.__name__] = sum(a.size for a in jax.tree.leaves(after))
    assert sizes["scanned"] == sizes["step_by_step"]
