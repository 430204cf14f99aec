"""Claim 7: noise after batch norm (Santurkar et al. 2018)."""

import jax
from jax import Array
from matplotlib.figure import Figure

import bn_jax as bn
from bn_jax.reproduce.claim import Check, Claim, Results, above, alike
from bn_jax.reproduce.network import Classifier, Normalize, Params, plain
from bn_jax.reproduce.plots import finish, line, rounded
from bn_jax.reproduce.study import Study
from bn_jax.reproduce.training import begin

METHODS = {"batch norm": "with", "noise after batch norm": "third", "without": "without"}


def noisy(x: Array, params: bn.BatchNormParams, state: tuple, *, train: bool) -> tuple:
    """Batch norm, and in training each feature's distribution shifted anew at each step.

    y ← s·y + m, with s ~ N(σ, 0.1²) and m ~ U(μ - 0.1, μ + 0.1) of each example, where
    σ ~ U(1, 1.25) and μ ~ U(-0.5, 0.5) are the feature's, drawn at each step (the paper's
    appendix A).
    """
    running, key = state
    y, running = bn.batch_norm(x, params, running, train=train)
    if train:
        key, *keys = jax.random.split(key, 5)
        mu = jax.random.uniform(keys[0], y.shape[1:], minval=-0.5, maxval=0.5)
        sigma = jax.random.uniform(keys[1], y.shape[1:], minval=1, maxval=1.25)
        s = sigma + 0.1 * jax.random.normal(keys[2], y.shape)
        y = s * y + mu + jax.random.uniform(keys[3], y.shape, minval=-0.1, maxval=0.1)
    return y, (running, key)


def measure(study: Study) -> Results:
    """Accuracy over training of the three networks."""
    results: Results = {}
    normalizations: dict[str, Normalize] = dict(
        zip(METHODS, (bn.batch_norm, noisy, plain), strict=True)
    )
    for method, normalize in normalizations.items():
        network = Classifier(normalize)

        def make(key: Array, values: dict, network: Classifier = network) -> tuple[Params, list]:
            params, states = network.make(key, values)
            if network.normalize is not noisy:
                return params, states
            keys = jax.random.split(key, len(states))
            return params, list(zip(states, keys, strict=True))

        runs = begin(make, study.seeds, init_std=0.04, learning_rate=0.15)
        options = {"measure": network.score, "steps": 10_000, "every": 500}
        _, series = study.train(method, runs, network.loss, **options)
        results["step"] = series["step"].tolist()
        results[method] = rounded(series["accuracy"])
    return results


def judge(results: Results) -> list[Check]:
    """Noise costs little, and leaves most of the advantage."""
    ours, with_noise, without = (results[method][-1] for method in METHODS)
    return [
        above("noise after batch norm is better than no batch norm", with_noise, without),
        alike("and within a point of batch norm", with_noise, ours, within=0.01),
    ]


def draw(results: Results, figure: Figure) -> None:
    """Accuracy over training."""
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    for method, style in METHODS.items():
        line(axes, results["step"], results[method], method, style)
    finish(axes, "step", "test accuracy", ylim=(0.7, 1))


claim = Claim(
    name="noise",
    title="Batch norm works as well with unstable distributions",
    statement="With noise after batch norm, which makes the inputs of every layer shift at every "
    "step, networks still train about as well as with batch norm: stable distributions are not why "
    "it works.",
    source="Santurkar, Tsipras, Ilyas & Madry 2018, section 2.2, Figure 2",
    published="VGG on CIFAR-10: the curves of standard and “noisy” batch norm are almost the same, "
    "both above the network without; no numbers are given.",
    prediction="After 10,000 steps, noise after batch norm is better than no batch norm, and "
    "within a point of batch norm.",
    protocol="The network of Figure 1; noise as in the paper.",
    measure=measure,
    judge=judge,
    draw=draw,
    remark="The noise costs nothing that five seeds could show (.967 with it and without it; .921 "
    "without batch norm), although it moves the inputs of every layer at every step.",
)
