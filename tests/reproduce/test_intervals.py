"""Intervals: what they must be by their definitions."""

import numpy as np
import pytest

from bn_jax.reproduce.intervals import improvement, mean_interval


def test_an_interval_of_the_mean_covers_it_as_often_as_it_says():
    """Of 4,000 means of five normal numbers; ±1.4 points are four standard errors."""
    samples = np.random.default_rng(0).normal(3, 2, (4000, 5))
    intervals = [mean_interval(sample) for sample in samples]
    covered = np.mean([low <= 3 <= high for _, low, high in intervals])
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="1 seeds have no interval; run at least 2"):
        mean_interval([0.9])


def test_improvement_is_the_share_of_pairs_that_one_wins():
    x, y = np.random.default_rng(1).normal(size=(2, 7))
    expected = np.mean([a > b for a in x for b in y])
    found = improvement(x, y)
    assert found.mean == pytest.approx(expected, abs=1e-12)
    assert found.low <= found.mean <= found.high
    assert improvement(y, x).mean == pytest.approx(1 - expected, abs=1e-12)


def test_ties_count_half():
    assert improvement([1.0, 1.0], [1.0, 1.0]) == (0.5, 0.5, 0.5)
