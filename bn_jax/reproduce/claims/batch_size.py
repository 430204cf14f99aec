"""Claim 9: batch norm needs enough examples, and what helps where there are few or many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import bn_jax as bn
from bn_jax.reproduce.claim import Check, Claim, Results, above
from bn_jax.reproduce.network import Classifier, Normalize
from bn_jax.reproduce.plots import finish, line, rounded
from bn_jax.reproduce.study import Study
from bn_jax.reproduce.training import begin

SIZES = (2, 4, 8, 32)
LARGE, GHOST = 1000, 50
EXAMPLES = 60_000
RATES = (0.01, 0.03, 0.1)
LARGE_RATES = (0.1, 0.3, 1.0)
METHODS = ("batch norm", "renormalization", "frozen for the last quarter")


def normalization(method: str, steps: int) -> Normalize:
    """A method by its name."""
    if method == "renormalization":
        r_max = optax.linear_schedule(1, 3, steps // 4, transition_begin=steps // 10)
        d_max = optax.linear_schedule(0, 5, steps // 4, transition_begin=steps // 10)
        return functools.partial(bn.batch_renorm, r_max=r_max, d_max=d_max)
    if method.startswith("frozen"):
        return functools.partial(frozen_late, after=steps * 3 // 4)
    return functools.partial(bn.batch_norm, group_size=GHOST if method == "ghost" else None)


def frozen_late(
    x: Array, params: bn.BatchNormParams, state: bn.BatchNormState, *, train: bool, after: int
) -> tuple[Array, bn.BatchNormState]:
    """Batch norm that trains by its running statistics once it has seen some batches."""
    fixed, _ = bn.batch_norm(x, params, state, train=False)
    if not train:
        return fixed, state
    y, new = bn.batch_norm(x, params, state, train=True)
    late = state.count[0] >= after
    return jnp.where(late, fixed, y), jax.tree.map(functools.partial(jnp.where, late), state, new)


def measure(study: Study) -> Results:
    """Accuracy after one epoch (large batches: ten), of each method at each rate."""
    results: Results = {}
    for size in SIZES:
        for method in METHODS:
            results[f"{method}, {size}"] = scores(study, method, size, EXAMPLES, RATES)
    for method in ("batch norm", "ghost"):
        results[f"{method}, {LARGE}"] = scores(study, method, LARGE, 10 * EXAMPLES, LARGE_RATES)
    return results


def scores(
    study: Study, method: str, size: int, examples: int, rates: tuple[float, ...]
) -> list[list[float]]:
    """Accuracies [rates, seeds]."""
    steps = examples // size // 4 * 4
    network = Classifier(normalization(method, steps), jax.nn.relu)

    runs = begin(network.make, study.seeds, learning_rate=rates)
    options = {"steps": steps, "every": steps // 4, "batch_size": size, "measure": network.score}
    _, series = study.train(f"{method}, batches of {size}", runs, network.loss, **options)
    return rounded(series["accuracy"][-1].reshape(len(rates), study.seeds))


def best(table: list[list[float]]) -> list[float]:
    """The seeds' accuracies at the best rate."""
    return max(table, key=np.mean)


def judge(results: Results) -> list[Check]:
    """Batch norm by batch size, and its cures."""
    at = {name: best(table) for name, table in results.items()}
    plain, renorm, frozen = METHODS
    return [
        above("32 examples are a point better than 2", at[f"{plain}, 32"], at[f"{plain}, 2"], 0.01),
        above("batches of 4: renormalization helps", at[f"{renorm}, 4"], at[f"{plain}, 4"]),
        above("batches of 2: freezing late helps", at[f"{frozen}, 2"], at[f"{plain}, 2"]),
        above(
            f"batches of {LARGE:,}: ghost batches of {GHOST} help",
            at[f"ghost, {LARGE}"],
            at[f"{plain}, {LARGE}"],
        ),
    ]


def draw(results: Results, figure: Figure) -> None:
    """Accuracy over the batch size, at each method's best rate."""
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    for method, style in zip(METHODS, ("with", "third", "fourth"), strict=True):
        line(axes, SIZES, [best(results[f"{method}, {size}"]) for size in SIZES], method, style)
    finish(axes, "examples per batch", "test accuracy after an epoch", xscale="log")
    axes.set_xticks(SIZES, map(str, SIZES))
    axes.minorticks_off()


claim = Claim(
    name="batch-size",
    title="Batch norm needs enough examples, and has cures where it lacks them",
    statement="Tiny batches hurt batch norm; renormalization and freezing help there. With large "
    "batches, normalizing small groups (ghost batches) generalizes better.",
    source="Ioffe 2017; Wu & Johnson 2021, section 4; Hoffer, Hubara & Soudry 2017",
    published="Renormalization at 4 examples: 74.2 → 76.5 (ImageNet, Ioffe 2017).",
    prediction="Batch norm at 32 examples is more than a point better than at 2; renormalization "
    "helps at 4, freezing the statistics for the last quarter helps at 2, and ghost batches help "
    "at 1,000.",
    protocol="3 hidden layers of 100 rectifiers, one epoch (ten at 1,000 examples), every method "
    "at the best of three learning rates.",
    measure=measure,
    judge=judge,
    draw=draw,
    remark="With two examples, batch norm by running statistics fails (.37 at the best rate). With "
    "statistics frozen for the last quarter it ends at .85. Ghost batches gain two thousandths, "
    "beyond chance but little.",
)
