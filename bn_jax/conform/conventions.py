"""What running averages remember: the conventions in use, and the mistakes that look like them.

Every convention averages the batches' means, and the same for their variances. They differ in how
the average starts, and in whether the variances are biased (σ²) or unbiased (m/(m - 1)·σ²).
"""

from collections.abc import Sequence

import numpy as np

from bn_jax.conform import oracle

Average = tuple[np.ndarray, np.ndarray]
BIASED_START = "starts from mean 0 and variance 1"
NO_DECAY = "mean of all batches, whatever the decay"


def ema(values: Sequence[np.ndarray], decay: float, start: float | np.ndarray) -> np.ndarray:
    """The exponential moving average of values, from a start."""
    total = np.zeros_like(values[0]) + start
    for value in values:
        total = decay * total + (1 - decay) * value
    return total


def of_batches(
    batches: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None
) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """The batches' means and variances; the variances are biased, or unbiased."""
    weights = masks if masks is not None else [None] * len(batches)
    moments = [oracle.forward(x, weights=w) for x, w in zip(batches, weights, strict=True)]
    means = [m.mean for m in moments]
    bessel = [m.count / np.maximum(m.count - 1, 1) for m in moments]
    return {
        "biased": (means, [m.var for m in moments]),
        "unbiased": (means, [m.var * b for m, b in zip(moments, bessel, strict=True)]),
    }


def accepted(
    batches: Sequence[np.ndarray], decay: float, masks: Sequence[np.ndarray] | None = None
) -> dict[str, Average]:
    """The averages that libraries in use compute on purpose, by their names."""
    found, shrunk = {}, 1 - decay ** len(batches)
    for kind, (means, variances) in of_batches(batches, masks).items():
        found |= {
            f"debiased, variance {kind}": tuple(
                ema(v, decay, 0) / shrunk for v in (means, variances)
            ),
            f"starts from the first batch, variance {kind}": tuple(
                ema(v[1:], decay, v[0]) for v in (means, variances)
            ),
            f"{BIASED_START}, variance {kind}": (ema(means, decay, 0), ema(variances, decay, 1)),
            f"{NO_DECAY}, variance {kind}": (np.mean(means, 0), np.mean(variances, 0)),
        }
    return found


def mistaken(
    batches: Sequence[np.ndarray], decay: float, masks: Sequence[np.ndarray] | None = None
) -> dict[str, Average]:
    """The averages that known bugs compute, by the bugs' names."""
    found, shrunk = {}, 1 - decay ** len(batches)
    for kind, (means, variances) in of_batches(batches, masks).items():
        right, stds = ema(means, decay, 0), [np.sqrt(v) for v in variances]
        found |= {
            f"the variance starts at 0 and is not debiased, {kind}": (
                right,
                ema(variances, decay, 0),
            ),
            f"debiased as if from 0, but the variance starts at 1, {kind}": (
                right / shrunk,
                ema(variances, decay, 1) / shrunk,
            ),
            f"standard deviations are averaged, {kind}": (right, ema(stds, decay, 1) ** 2),
            f"keeps the last batch only, {kind}": (means[-1], variances[-1]),
        }
    for name, average in accepted(batches, 1 - decay, masks).items():
        if not name.startswith(NO_DECAY):
            found[f"momentum inverted: weighs the past by 1 - decay ({name})"] = average
    if masks is not None:
        for name, average in accepted(batches, decay).items():
            found[f"the mask is ignored ({name})"] = average
    means = of_batches(batches, masks)["biased"][0]
    return found | {"never updated": (np.zeros_like(means[0]), np.ones_like(means[0]))}
