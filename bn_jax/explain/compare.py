"""What a layer remembers, beside what the data are: numbers per feature, from which to judge.

Both are taken for normal distributions, of which normalization knows no more: mean and variance,
with ε. Two figures say how far they are from each other. One is the symmetric Kullback-Leibler
divergence

    J = ½ (v₁/v₂ + v₂/v₁ - 2) + ½ (μ₁ - μ₂)² (1/v₁ + 1/v₂),   v = σ² + ε,

which is 0 for the same, about the squared shift in standard deviations for means, and about half
the squared relative change for variances. The other is the root mean square by which the layer's
output, before scale and bias, differs from what the data's own statistics would give.

How far is far? The batches tell: each of them has statistics too, and their distances from the
data are what a running average of one batch would have.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_jax.core.population import Seen
from bn_jax.core.state import BatchNormState
from bn_jax.explain.likeness import Batches, Likeness, Values, likeness


class Comparison(NamedTuple):
    """One layer, per feature.

    Attributes:
        change: the root mean square of the change in output, in standard deviations of the output.
        distance: J of the running statistics and the training data.
        noise: what J would be on average for the statistics of a single batch, from how much the
            batches differ. A running average of n batches is at 1/n of it.
        purity: the variance between the means of batches, over what it would be by chance: where
            the same examples are mixed into other batches. Without these, chance is 1/m of the
            data's variance for m examples in a batch, which is right where each has one value.
        shift: J of the evaluation data and the training data; NaN without evaluation data.
        epsilon: the share of ε in σ² + ε of the data; 1 for a dead feature.
        variance: of the training data.
        excess: the logarithm of the running variance over the data's, with ε.
        new: the running statistics are 0 and 1, or 0 and 0 where that is wrong, as before the first
            batch.
        finite: the running statistics are finite, and the variance is not negative.
        known: the training data have values and finite moments.
        dead: no variance beside that of the other features: below 10⁻⁸ of their median.
        rare: so few batches show what the feature does that its statistics are known badly: a
            noise above 2, as of an input that differs from 0 in one batch of five.
        exploding: a variance above 10⁸ times the median.
        young: the share of the past in the running statistics, if they are an average that started
            at 0 and 1 and has not forgotten it; else 0. One number for the layer.
        likeness: to the statistics of a single batch. For the layer.
    """

    change: Values
    distance: Values
    noise: Values
    purity: Values
    shift: Values
    epsilon: Values
    variance: Values
    excess: Values
    new: Values
    finite: Values
    known: Values
    dead: Values
    rare: Values
    exploding: Values
    young: float
    likeness: Likeness


def gather(batches: Iterable[Any]) -> list[Batches]:
    """What each layer normalized, from what is seen of one batch at a time."""
    layers: list[list[Any]] = []
    for batch in batches:
        seen: list[Seen] = jax.tree.leaves(batch, is_leaf=lambda node: isinstance(node, Seen))
        of_batch = [(s.means.mean, s.means.rest, s.variances.mean, s.means.count) for s in seen]
        layers = layers or [[] for _ in seen]
        for layer, values in zip(layers, jax.device_get(of_batch), strict=True):
            layer.append(values)
    return [stack(layer) for layer in layers]


def stack(batches: list[Any]) -> Batches:
    """One layer's statistics as arrays; the mean with what rounding it has lost."""

    def table(values: Iterable[Any]) -> Values:
        wide = [np.asarray(v) * np.float64(1) for v in values]
        return np.stack(wide).reshape(len(wide), -1)

    means, rests, variances, counts = zip(*batches, strict=True)
    mean = table(means) if rests[0] is None else table(means) + table(rests)
    return Batches(mean, table(variances), table(counts))


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def compare(
    running: BatchNormState,
    training: Batches,
    mixed: Batches | None,
    evaluation: Batches | None,
    *,
    batch_size: int,
    epsilon: float,
    momentum: float | None,
) -> Comparison:
    """What a layer remembers beside what it sees, also of the training examples mixed."""
    mean, var = (np.asarray(part).reshape(-1) * np.float64(1) for part in running[:2])
    center, within, between = parts_of(training)
    known = training.number.sum(0) > 0
    data = within + between
    v, w = data + epsilon, var + epsilon
    usual = np.median(data[known]) if known.any() else 0.0
    dead = known & (data <= 1e-8 * usual)
    finite = np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    live = known & finite & ~dead
    moved = abs(mean - center) ** 2
    chance = data / batch_size if mixed is None else parts_of(mixed)[2]
    shift = np.full_like(v, np.nan)
    if evaluation is not None:
        other, inside, outside = parts_of(evaluation)
        shift = divergence(abs(other - center) ** 2, inside + outside + epsilon, v)
    weight = training.number / np.maximum(training.number.sum(0), 1)
    steady = (weight * training.var).sum(0)
    unsteady = (weight * (training.var - steady) ** 2).sum(0)
    noise = between / v + unsteady / v**2 / 2  # ½ t²/v² of variances that vary by t²
    return Comparison(
        change=np.sqrt((np.sqrt(v / w) - 1) ** 2 + moved / w),
        distance=divergence(moved, w, v),
        noise=noise,
        purity=between / chance,
        shift=shift,
        epsilon=epsilon / v,
        variance=data,
        excess=np.log(w / v),
        new=(mean == 0) & ((var == 1) | ((var == 0) & ~dead)),
        finite=finite,
        known=known,
        dead=dead,
        rare=noise > 2,
        exploding=known & (data > 1e8 * usual) & (usual > 0),
        young=young(mean[live], w[live], center[live], v[live], 1 + epsilon),
        likeness=likeness(mean, var, training, live)._replace(momentum=momentum),
    )


def parts_of(batches: Batches) -> tuple[Values, Values, Values]:
    """The mean of all values, and their variance within and between batches, unbiased together."""
    count = batches.number.sum(0)
    weight = batches.number / np.maximum(count, 1)
    mean = (weight * batches.mean).sum(0)
    correction = np.where(count > 1, count / np.maximum(count - 1, 1), 1)
    within = correction * (weight * batches.var).sum(0)
    return mean, within, correction * (weight * abs(batches.mean - mean) ** 2).sum(0)


def divergence(moved: Values, v: Values, w: Values) -> Values:
    """J, per feature, of squared differences of means and two variances."""
    ratio = (v - w) ** 2 / (v * w)  # v/w + w/v - 2, without cancellation
    return (ratio + moved * (1 / v + 1 / w)) / 2


def young(mean: Values, var: Values, center: Values, v: Values, start: float) -> float:
    """How much an average that started at 0 and `start` has kept of it, if that explains it.

    Such an average is (1 - k)·data + k·(0, start) with the same k for all features; the least
    squares k explains it where 9/10 of the squares are gone, of means and of variances.
    """
    if not len(mean):
        return 0.0
    toward = np.stack([-center / np.sqrt(v), (start - v) / v])
    gone = np.stack([(mean - center) / np.sqrt(v), (var - v) / v])
    kept = float((np.conj(toward) * gone).sum().real / max((abs(toward) ** 2).sum(), 1e-300))
    rest, whole = ((abs(part) ** 2).sum(1) for part in (gone - kept * toward, gone))
    # Both: weights that have grown make means and variances too small as well, but not alike.
    return kept if 0 < kept < 1 and (rest < 0.1 * whole).all() else 0.0
