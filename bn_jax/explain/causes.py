"""What may be wrong with an evaluation: how it shows, in words, and what to do, in code."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Api = Literal["functional", "linen", "nnx", "run"]
"""What a remedy is written for: functions, Flax's two APIs, or a run of `bn-jax train`."""

RECALIBRATE = {
    "functional": "states = bn_jax.recalibrate(forward, params, states, batches)",
    "linen": "from bn_jax.inference.recalibrate import recalibrate_linen\n"
    "variables = recalibrate_linen(forward, variables, batches)",
    "nnx": "from bn_jax.inference.recalibrate import recalibrate_nnx\n"
    "recalibrate_nnx(forward, model, batches)",
    "run": "bn-jax evaluate RUN --statistics population",
}


def layers(option: str, note: str, functional: str, run: str) -> dict[str, str]:
    """The remedy that is an option of the layers."""
    layer = f"BatchNorm({option})  # {note}"
    return {"functional": functional, "linen": layer, "nnx": layer, "run": run}


def everywhere(code: str, run: str) -> dict[str, str]:
    """The remedy that is the same in all APIs."""
    return {"functional": code, "linen": code, "nnx": code, "run": run}


def after(code: str, run: str) -> dict[str, str]:
    """New statistics, and first something else."""
    first = everywhere(code, run)
    return {api: f"{first[api]}\n{RECALIBRATE[api]}" for api in first}


@dataclasses.dataclass(frozen=True)
class Cause:
    """Something that may be wrong.

    Attributes:
        name: in two words.
        found: whether a layer's row shows it.
        says: it, in one sentence.
        remedy: short lines of code, by API.
        together: a condition on all layers together.
        differ: it explains why running statistics differ from the data's, for which one
            explanation is enough.
    """

    name: str
    found: Callable[[Any], bool]
    says: str
    remedy: Mapping[str, str]
    together: Callable[[Sequence[Any]], bool] | None = None
    differ: bool = False


def of_one_batch(rows: Sequence[Any]) -> bool:
    """Whether the running statistics of all layers look like those of one batch (`Likeness`).

    Where layers say that their momentum is small, that is enough. Else (it may be another now than
    in training) the squares of both kinds have to be about 1 per direction; a quarter to 2.5 leaves
    room for chance, for a momentum of 0.1, and for deviations known from few batches only.
    """
    likes = [row.likeness for row in rows]
    weights = [like.directions / max(sum(like.directions for like in likes), 1) for like in likes]
    squares = (
        sum(w * like.means for w, like in zip(weights, likes, strict=True)),
        sum(w * like.variances for w, like in zip(weights, likes, strict=True)),
    )
    stated = all(like.momentum is not None and like.momentum < 0.5 for like in likes)
    typical = all(1 / 4 < square < 2.5 for square in squares)
    return all(like.fits for like in likes) and (stated or typical)


def have_excess(rows: Sequence[Any]) -> bool:
    """Whether running variances are larger than the data's, by e^0.15 on average over layers."""
    return sum(row.excess for row in rows) > 0.15 * len(rows)


TRAIN_FLAG = Cause(
    "train flag",
    lambda row: False,  # no statistics show it: `assert_independent` does
    "evaluation normalizes by the batch: an output depends on other examples",
    {
        "functional": "y, _ = bn_jax.batch_norm(x, params, state, train=False)",
        "linen": "logits = model.apply(variables, x, train=False)",
        "nnx": "model.eval()",
        "run": "bn-jax evaluate RUN",
    },
)

# In the order of how surely each one alone explains a bad evaluation. The thresholds were set on
# the seeds TUNE of tests/explain/calibrate.py; the documented figures are of other seeds.
CAUSES = (
    Cause(
        "not finite",
        lambda row: row.broken > 0,
        "running statistics are not finite, or a variance is negative",
        after(
            'jax.config.update("jax_debug_nans", True)  # finds the step that made them',
            "JAX_DEBUG_NANS=True bn-jax train",
        ),
    ),
    Cause(
        "data not finite",
        lambda row: row.unknown > 0,
        "what the layer sees in training is not finite, or nothing",
        everywhere(
            'jax.config.update("jax_debug_nans", True)  # finds the operation that made them',
            "JAX_DEBUG_NANS=True bn-jax train",
        ),
    ),
    Cause(
        "never updated",
        lambda row: row.new > row.features // 2,
        "running statistics are those of a new layer, 0 and 1: training did not keep them, or the "
        "checkpoint has none",
        {
            "functional": "y, state = bn_jax.batch_norm(x, params, state, train=True)  # keep state"
            f"\n{RECALIBRATE['functional']}",
            "linen": 'logits, updates = model.apply(variables, x, mutable=["batch_stats"])\n'
            f"variables = {{**variables, **updates}}\n{RECALIBRATE['linen']}",
            "nnx": "train_step = nnx.jit(train_step)  # jax.jit forgets what changes in the model\n"
            f"{RECALIBRATE['nnx']}",
            "run": RECALIBRATE["run"],
        },
        differ=True,
    ),
    Cause(
        "pure batches",
        lambda row: row.purity > 3,
        "training batches differ by more than chance: sorted, or of few classes each",
        everywhere(
            "rows = np.random.default_rng(epoch).permutation(len(images))\n"
            "images, labels = images[rows], labels[rows]",
            "bn-jax train  # without --classes-per-batch, it shuffles",
        ),
    ),
    Cause(
        "young average",
        lambda row: row.young > 0.05 and row.change > 0.1,
        "the running average still holds its initial values, 0 and 1: it has seen few batches",
        layers(
            "average=bn_jax.DebiasedEma(0.99)",
            "of bn_jax.layers",
            "average = bn_jax.DebiasedEma(0.99)  # corrects for the initial values",
            "bn-jax train --average debiased",
        ),
        differ=True,
    ),
    Cause(
        "inverted momentum",
        lambda row: row.likeness.fits,
        "running statistics are those of about one batch: the momentum looks inverted",
        layers(
            "momentum=0.99",
            "the weight of the past, 1 - torch's momentum",
            "average = bn_jax.DebiasedEma(0.99)  # the weight of the past",
            "bn-jax train --decay 0.99",
        ),
        together=of_one_batch,
        differ=True,
    ),
    Cause(
        "other weights",
        lambda row: row.distance > 0.2,
        "running statistics do not belong to these weights: stale, or of another checkpoint",
        RECALIBRATE,
        differ=True,
    ),
    Cause(
        "small batches",
        lambda row: row.noise > 0.2,
        "batches are so small that their statistics say little about the population's",
        layers(
            "renorm=(3, 5)",
            "of bn_jax.layers; or larger batches",
            "y, state = bn_jax.batch_renorm(x, params, state, train=True, r_max=3, d_max=5)",
            "bn-jax train --batch-size 60",
        ),
    ),
    Cause(
        "averaged weights",
        lambda row: row.change > 0.12 and row.noise < 0.2,
        "running variances are too large for these weights, which became smaller since: they were "
        "averaged (EMA, SWA), or decayed fast",
        RECALIBRATE,
        together=have_excess,
        differ=True,
    ),
    Cause(
        "lagging average",
        lambda row: row.change > 0.15 and row.noise < 0.2,
        "the running average lags behind the weights, which move fast: let the learning rate fall "
        "at the end, or take new statistics",
        after(
            "schedule = optax.cosine_decay_schedule(learning_rate, steps)",
            "bn-jax train --schedule cosine",
        ),
        differ=True,
    ),
    Cause(
        "shifted evaluation",
        lambda row: row.shift > 0.1,
        "evaluation data are distributed otherwise than training data",
        everywhere(
            "images = (images - train_mean) / train_std  # for training and evaluation alike",
            "bn-jax evaluate RUN",
        ),
    ),
    Cause(
        "epsilon",
        lambda row: row.epsilon > 0.5,
        "ε is larger than the variance of most features, so they come out too small",
        layers(
            "epsilon=1e-5",
            "or inputs of a larger scale",
            "y, state = bn_jax.batch_norm(x, params, state, train=True, epsilon=1e-5)",
            "bn-jax train --epsilon 1e-5",
        ),
    ),
    Cause(
        "exploding features",
        lambda row: row.exploding > 0,
        "features have a variance of more than 10⁸ times that of the others",
        everywhere(
            "optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)",
            "bn-jax train --learning-rate 0.05",
        ),
    ),
    Cause(
        "dead features",
        lambda row: row.dead > 0,
        "features are constant over the training data (dead units, or inputs that never change): "
        "they carry nothing but bias",
        everywhere(
            "optimizer = optax.sgd(learning_rate / 10)  # they may also be pruned",
            "bn-jax train --learning-rate 0.05",
        ),
    ),
)
