"""Are a layer's running statistics those of a single batch, as an inverted momentum leaves them?"""

from typing import NamedTuple

import numpy as np

Values = np.ndarray

SAME = 0.1
"""Directions whose standard deviation over batches is below this share of the largest are left out:
there, a step of the weights moves the mean by more than batches do (few features, many values)."""


class Batches(NamedTuple):
    """The statistics of what one layer normalized, [batches, features] in float64."""

    mean: Values
    var: Values
    number: Values


class Likeness(NamedTuple):
    """Could a layer's running statistics be those of a single batch?

    The errors of one batch's means and variances, each divided by their own standard deviations
    over batches, have a mean square of 1 in expectation; those of an average of many batches a much
    smaller one. Where the weights have moved since, the means are further off than the variances,
    in some layers more than in others, and in directions in which batches do not differ.

    Attributes:
        fits: the mean squares, of means and of variances, lie within the range that batches have,
            which is as wide as features are few or alike. It is widened by a half downwards, as an
            inverted momentum may keep some of the past (0.1: the mean square falls to .82), and by
            two upwards, as the last batch was seen by the weights of one step before.
        means: the mean square of the error of the means along the directions in which batches
            differ most, each in standard deviations: 1 in expectation.
        variances: the same of the variances.
        directions: how many for the means; a quarter of the batches at most, so that their
            deviations are known.
        momentum: the layer's own weight of the past, if it is known.
    """

    fits: bool
    means: float
    variances: float
    directions: int
    momentum: float | None = None


def likeness(mean: Values, var: Values, training: Batches, live: Values) -> Likeness:
    """How running statistics compare with those of single batches."""
    nothing = Likeness(False, 0.0, 0.0, 0)
    batches = Batches(*(part[:, live] for part in training))
    if len(batches.mean) < 10 or not live.any() or (batches.number <= 0).any():
        return nothing
    fits, squares, numbers = True, list[float](), list[int]()
    for value, of_batches in ((mean[live], batches.mean), (var[live], batches.var)):
        middle, deviation = of_batches.mean(0), of_batches.std(0, ddof=1)
        steady = deviation > 0
        if not steady.any():
            return nothing
        errors = ((np.vstack([value, of_batches]) - middle) / np.maximum(deviation, 1e-300))[
            :, steady
        ]
        own, *others = (abs(errors) ** 2).mean(1)
        fits = fits and min(others) / 1.5 <= own <= 2 * max(others)
        _, sizes, directions = np.linalg.svd(errors[1:], full_matrices=False)
        kept = min(len(sizes), len(others) // 4, int((sizes > SAME * sizes[0]).sum()))
        along = abs(directions[:kept].conj() @ errors[0]) ** 2 / sizes[:kept] ** 2
        squares.append(float(along.mean()) * (len(others) - 1))
        numbers.append(kept)
    return Likeness(fits, squares[0], squares[1], numbers[0])
