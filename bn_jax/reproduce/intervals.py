"""What a few seeds say: means with intervals, and how often one method beats another.

Results are means over seeds with 95% intervals by Student's t. Where two methods are compared,
their runs of one seed share initial weights and batches, so that the interval is that of the
differences. The probability of improvement, P(X > Y) for a run of each, is that of Agarwal et al.
2021 ("Deep RL at the edge of the statistical precipice"), with a bootstrap interval. At five seeds
a bootstrap is too narrow, so that no verdict depends on it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean, and the ends of its 95% interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean over seeds, with the interval of Student's t.

    Raises:
        ValueError: there are fewer than two seeds, which have no interval.

    >>> [round(end, 2) for end in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    array = np.asarray(values, float)
    if len(array) < 2:
        raise ValueError(f"{len(array)} seeds have no interval; run at least 2")
    mean = float(array.mean())
    spread = float(array.std(ddof=1)) / len(array) ** 0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1)) * spread
    return Interval(mean, mean - half, mean + half)


def improvement(better: Sequence[float], worse: Sequence[float], draws: int = 2000) -> Interval:
    """P(X > Y) + P(X = Y)/2 for a run of each of two methods, with its bootstrap interval.

    >>> improvement([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    >>> improvement([1.0, 2.0], [1.0, 2.0]).mean
    0.5
    """
    x, y = np.asarray(better, float), np.asarray(worse, float)
    random = np.random.default_rng(0)

    def probability(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        difference = x[..., :, None] - y[..., None, :]
        return ((difference > 0) + (difference == 0) / 2).mean((-2, -1))

    drawn = probability(random.choice(x, (draws, len(x))), random.choice(y, (draws, len(y))))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(probability(x, y)), float(low), float(high))
