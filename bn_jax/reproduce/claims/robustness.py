"""Claim 2: batch norm trains at rates and initial weights where a plain network does not."""

import itertools

import jax
import numpy as np
from matplotlib.figure import Figure

import bn_jax as bn
from bn_jax.reproduce.claim import Check, Claim, Results, mean_within
from bn_jax.reproduce.network import Classifier, plain
from bn_jax.reproduce.plots import rounded
from bn_jax.reproduce.study import Study
from bn_jax.reproduce.training import begin

ARMS = {"with": bn.batch_norm, "without": plain}
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}
INIT_STDS = (0.05, 10.0)
LEARNING_RATES = (0.01, 2.0)
CELLS = tuple(itertools.product(INIT_STDS, LEARNING_RATES))
PUBLISHED = {
    ("sigmoid", 0.05, 0.01): (0.970, 0.857),
    ("relu", 0.05, 2.0): (0.980, 0.098),
    ("sigmoid", 10.0, 2.0): (0.935, 0.098),
    ("relu", 10.0, 2.0): (0.097, 0.098),
}
"""(nonlinearity, σ, learning rate) -> accuracy with and without batch norm."""


def measure(study: Study) -> Results:
    """Accuracy at the end of every cell."""
    results: Results = {}
    for activation, arm in itertools.product(ACTIVATIONS, ARMS):
        hidden = (128, 128, 128)
        network = Classifier(ARMS[arm], ACTIVATIONS[activation], hidden, binarization="none")
        numbers = {"init_std": INIT_STDS, "learning_rate": LEARNING_RATES}
        runs = begin(network.make, study.seeds, **numbers)
        options = {"measure": network.score, "steps": 50_000, "every": 1000}
        _, series = study.train(f"{activation}, {arm}", runs, network.loss, **options)
        finals = series["accuracy"][-1].reshape(len(CELLS), study.seeds)
        results[f"{activation}, {arm}"] = rounded(finals)
    return results


def judge(results: Results) -> list[Check]:
    """Published cells: within 2 points with batch norm; trained or not without."""
    checks = []
    for (activation, std, rate), (with_bn, without) in PUBLISHED.items():
        cell = CELLS.index((std, rate))
        where = f"{activation}, σ {std:g}, rate {rate:g}"
        found = results[f"{activation}, with"][cell]
        band = (with_bn - 0.02, with_bn + 0.02)
        checks.append(mean_within(f"{where}, with: {with_bn:.3f} ± .02", found, *band))
        found = results[f"{activation}, without"][cell]
        if without < 0.2:
            checks.append(mean_within(f"{where}, without: does not train", found, 0, 0.2))
        else:
            text = f"{where}, without: trains, at least .02 below"
            checks.append(mean_within(text, found, 0.2, with_bn - 0.02))
    return checks


def draw(results: Results, figure: Figure) -> None:
    """Each cell's accuracy, with the seeds as points, and the published one."""
    figure.set_size_inches(9, 3.6)
    for axes, activation in zip(figure.subplots(1, 2, sharey=True), ACTIVATIONS, strict=True):
        for arm, shift, hatch, color in (
            ("with", -0.2, "", "tab:blue"),
            ("without", 0.2, "///", "tab:orange"),
        ):
            seeds = np.array(results[f"{activation}, {arm}"])
            x = np.arange(len(CELLS)) + shift
            label = {"with": "with batch norm", "without": "without"}[arm]
            style = {"hatch": hatch, "color": color, "edgecolor": "black", "alpha": 0.7}
            axes.bar(x, seeds.mean(1), 0.38, label=label, **style)
            axes.plot(np.repeat(x, seeds.shape[1]), seeds.ravel(), "k.", markersize=3)
            points = [
                (CELLS.index(key[1:]) + shift, pair[arm == "without"])
                for key, pair in PUBLISHED.items()
                if key[0] == activation
            ]
            axes.plot(*zip(*points, strict=True), "kx", label="published" * (arm == "without"))
        axes.set_xticks(range(len(CELLS)), [f"σ {s:g}\nrate {r:g}" for s, r in CELLS])
        axes.set(title=activation, ylabel="test accuracy at the end", ylim=(0, 1))
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].legend(fontsize="small", loc="lower left")


claim = Claim(
    name="robustness",
    title="Batch norm is robust to the learning rate and the initial weights",
    statement="Batch norm trains with learning rates and initial weights with which a plain "
    "network stays at chance; only the rectifier at σ = 10 and rate 2 fails with it, too.",
    source="Ioffe & Szegedy 2015, sections 3.3 and 4.1; the grid is a later replication's",
    published="; ".join(
        f"{a}, σ {s:g}, rate {r:g}: {with_bn:.3f} with and {without:.3f} without"
        for (a, s, r), (with_bn, without) in PUBLISHED.items()
    ),
    prediction="Each published cell with batch norm within 2 points; without, what was at chance "
    "is below .2, and what trained ends at least 2 points below batch norm.",
    protocol="3 hidden layers of 128, grey levels from 0 to 1, 50,000 steps of 60 examples by "
    "plain SGD; initial weights of standard deviation σ. A first full run had binary inputs, as in "
    "Figure 1; grey ones were taken after a trial of one cell with other seeds.",
    measure=measure,
    judge=judge,
    draw=draw,
    remark="All cells come out as published but the last with batch norm, where rectifiers stay at "
    "chance for four seeds and one reaches .32. The kind of input matters: with binary images, in "
    "the first run, sigmoids at σ 10 and rate 2 ended at .914 with batch norm and .241 without.",
)
