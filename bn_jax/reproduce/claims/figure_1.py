"""Claim 1: Figure 1 of the batch norm paper, all three panels."""

import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import bn_jax as bn
from bn_jax.reproduce.claim import Check, Claim, Results, differences, mean_within
from bn_jax.reproduce.network import Classifier, plain
from bn_jax.reproduce.plots import finish, line, rounded
from bn_jax.reproduce.study import Study
from bn_jax.reproduce.training import Data, Run, begin
from bn_jax.train.step import binarize

INIT_STD, LEARNING_RATE, BINARIZATION = 0.025, 0.3, "stochastic"
"""Found by two searches. First `bn-jax sweep` over init-std 0.03, 0.05, 0.1 and learning-rate 0.15,
0.3, 0.5, with one seed and either binarization: stochastic at 0.03, 0.3 came the closest to the
paper's curves of those within the bands of accuracy. Then this claim's own protocol over init-std
0.015, 0.02, 0.025 and learning-rate 0.3, 0.35, with three seeds that are not the claim's: all are
within the bands of accuracy but for 0.015, 0.3 (without batch norm first at .90 after 10,800).
The ratio of the steps to .95 is 4.2, 3.1, 3.2 at the rate 0.3 and 3.9, 2.9, 2.9 at 0.35; the root
mean square difference of log(1 - accuracy) from the paper's curves is .30, .22, .17 and .21, .14,
.11. Of those with a ratio of 3 or more, this is the closest. With batch norm, the median input to
the sigmoid strays by .65 to .93 in all six, out of its band."""
ARMS = {"with": bn.batch_norm, "without": plain}
LABELS = {"with": "with batch norm", "without": "without"}
PERCENTILES = (15, 50, 85)
LEVEL = 0.95


def measure(study: Study) -> Results:
    """Train both networks; accuracies, and the inputs to one typical sigmoid of each run."""
    results: Results = {}
    for arm, normalize in ARMS.items():
        network = Classifier(normalize, binarization=BINARIZATION)

        def look(run: Run, data: Data, network: Classifier = network) -> dict[str, Array]:
            inputs = binarize(data.test_images[:2000], BINARIZATION, jax.random.key(0))
            *_, entering = network.forward(run.params, run.states, inputs, train=False)
            percentiles = jnp.percentile(entering[-1], jnp.array(PERCENTILES), axis=0)
            return {**network.score(run, data), "inputs": percentiles}

        runs = begin(network.make, study.seeds, init_std=INIT_STD, learning_rate=LEARNING_RATE)
        options = {"measure": look, "steps": 50_000, "every": 500}
        _, series = study.train(LABELS[arm], runs, network.loss, **options)
        results[arm] = {
            "step": series["step"].tolist(),
            "accuracy": rounded(series["accuracy"]),
            "typical": [typical(series["inputs"][:, seed]) for seed in range(study.seeds)],
        }
    return results


def typical(inputs: np.ndarray) -> dict[str, list[float]]:
    """Of the sigmoids of a layer the one whose median input travels neither much nor little.

    Args:
        inputs: percentiles, [times, percentiles, sigmoids].
    """
    medians = inputs[:, PERCENTILES.index(50)]
    travel = np.ptp(medians, axis=0)
    unit = np.argsort(travel)[len(travel) // 2]
    return {str(p): rounded(inputs[:, i, unit], 3) for i, p in enumerate(PERCENTILES)}


def judge(results: Results) -> list[Check]:
    """The bands, for the means of the seeds."""
    steps = np.array(results["with"]["step"])
    early, middle = (int(abs(steps - wanted).argmin()) for wanted in (4000, 20_000))
    at = {arm: results[arm]["accuracy"] for arm in ARMS}
    gap = differences(at["with"][-1], at["without"][-1])
    firsts = {arm: first_steps(results[arm], LEVEL) for arm in ARMS}
    ratios = [b / max(a, 1) for a, b in zip(firsts["with"], firsts["without"], strict=True)]
    medians = {arm: np.array([t["50"] for t in results[arm]["typical"]], float) for arm in ARMS}
    stray, travel = abs(medians["with"]).max(1), np.ptp(medians["without"], axis=1)
    first_90 = first_steps(results["without"], 0.90)
    return [
        mean_within("with: at least .945 at 4,000 steps", at["with"][early], 0.945, 1),
        mean_within("with: at least .966 at 20,000", at["with"][middle], 0.966, 1),
        mean_within("with: .974 to .985 at the end", at["with"][-1], 0.974, 0.985),
        mean_within("without: at most .85 at 4,000 steps", at["without"][early], 0, 0.85),
        mean_within("without: first at .90 between 5,000 and 10,000", first_90, 5000, 10000),
        mean_within("without: .962 to .976 at the end", at["without"][-1], 0.962, 0.976),
        mean_within("gap at the end: .004 to .015", gap, 0.004, 0.015),
        mean_within("steps to .95, without ÷ with: at least 3", ratios, 3, np.inf),
        mean_within("with: the median input stays within ±.3", stray, 0, 0.3),
        mean_within("without: the median input travels .7 or more", travel, 0.7, np.inf),
    ]


def first_steps(arm: Results, level: float) -> list[int]:
    """Of each seed the first step at an accuracy; the last, if it is never reached."""
    reached = np.array(arm["accuracy"]) >= level
    steps = np.array(arm["step"])
    return [int(steps[r.argmax()] if r.any() else steps[-1]) for r in reached.T]


def draw(results: Results, figure: Figure) -> None:
    """The three panels, ours and the paper's."""
    figure.set_size_inches(11, 3.6)
    panels = figure.subplots(1, 3)
    paper = json.loads(resources.files("bn_jax.train").joinpath("figure_1a.json").read_text())
    for arm, name in (("with", "batch"), ("without", "none")):
        line(panels[0], results[arm]["step"], results[arm]["accuracy"], LABELS[arm], arm)
        label = "in the paper" if arm == "without" else None
        panels[0].plot(*zip(*paper[name], strict=True), ":", color="black", lw=1, label=label)
    finish(panels[0], "step", "test accuracy", "(a)", ylim=(0.7, 1))
    text = resources.files("bn_jax.reproduce").joinpath("figure_1bc.json").read_text()
    published = json.loads(text)
    for axes, arm, letter in zip(panels[1:], ("without", "with"), "bc", strict=True):
        steps = np.array(results[arm]["step"])
        for p, style in zip(map(str, PERCENTILES), ("--", "-", "--"), strict=True):
            label = {"50": "median", "15": "15th and 85th percentile"}.get(p)
            axes.plot(steps, results[arm]["typical"][0][p], style, color="tab:blue", label=label)
            x, y = np.array(published[arm][p]).T
            label = "in the paper" if p == "50" else None
            axes.plot(x * steps[-1], y, ":", color="black", lw=1, label=label)
        finish(axes, "step", "input to one sigmoid", f"({letter}) {LABELS[arm]}", ylim=(-4.2, 4.2))


claim = Claim(
    name="figure-1",
    title="Batch norm trains faster and ends higher",
    statement="The network with batch norm reaches a higher test accuracy, with fewer steps, and "
    "the inputs to its nonlinearities are more stable.",
    source="Ioffe & Szegedy 2015, section 4.1, Figure 1",
    published="With: .953 at 4,000 steps, .974 at 20,000, .982 at the end. Without: .734, .963, "
    ".972. Accuracy .95 is reached in fewer than 4,000 steps with, in 14,600 without.",
    prediction="The bands of the table below, for means of the seeds.",
    protocol="3 hidden layers of 100 sigmoids, binary MNIST, 50,000 steps of 60 examples by plain "
    "SGD. The paper leaves open the learning rate, the standard deviation of the initial weights, "
    f"and how images become binary; here they are {LEARNING_RATE}, {INIT_STD}, and drawn anew at "
    "each step with the grey level as probability, found by a search for curves like the paper's.",
    measure=measure,
    judge=judge,
    draw=draw,
    remark="The curves of (a) lie on the paper's but for the first steps without batch norm. The "
    "median in (b) travels as predicted, to another level. In (c) it strays by 0.7, more than "
    "twice as far as allowed and four times as far as in the paper; so it did, by 0.65 to 0.93, in "
    "all six settings of our second search. That stability we could not reproduce.",
)
