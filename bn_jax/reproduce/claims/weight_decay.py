"""Claim 8: weight decay is an exponential learning rate (Li & Arora 2020)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import bn_jax as bn
from bn_jax.reproduce.claim import Check, Claim, Results, true
from bn_jax.reproduce.network import Classifier, Params
from bn_jax.reproduce.plots import STYLES, finish
from bn_jax.reproduce.study import Study
from bn_jax.reproduce.training import shuffled

RATE, DECAY, STEPS = 0.1, 0.05, 200
EPSILONS = (0.0, 1e-5, 1e-2)


def measure(study: Study) -> Results:
    """The largest difference between the logits of both trainings, step by step, in float64."""
    steps = 10 if study.quick else STEPS
    data, labels, *_ = study.arrays
    rows = shuffled(60, len(data))(jax.random.key(1), jnp.int32(0), steps)
    study.watch("in float64", 0, steps)
    with jax.enable_x64(True):
        batches = jnp.asarray(np.asarray(data)[rows] > 127, jnp.float64), labels[rows]
        results = {
            f"{epsilon:g}": [
                [float(f"{d:.3g}") for d in differences(epsilon, jax.random.key(seed), *batches)]
                for seed in range(study.seeds)
            ]
            for epsilon in EPSILONS
        }
    study.watch("in float64", steps, steps)
    return results


def differences(epsilon: float, key: Array, images: Array, labels: Array) -> np.ndarray:
    """After each step, max |difference of the logits| between the two ways to train."""
    network = Classifier(functools.partial(bn.batch_norm, epsilon=epsilon), jax.nn.relu)
    params, states = network.make(key, {})
    params, states = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        (params, states),
    )

    def loss(params: Params, images: Array, labels: Array) -> tuple[Array, Array]:
        logits, *_ = network.forward(params, states, images, train=True)
        losses = -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
        return losses.mean(), logits

    def update(params: Params, batch: Sequence[Array], rate: Array | float, decay: float) -> tuple:
        """Plain SGD; the weights before a batch norm by a rate of their own, and with decay."""
        grads, logits = jax.grad(loss, has_aux=True)(params, *batch)
        new = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        *kernels, _ = zip(params.kernels, grads.kernels, strict=True)
        hidden = [(1 - RATE * decay) * w - rate * g for w, g in kernels]
        return new._replace(kernels=[*hidden, new.kernels[-1]]), logits

    def step(both: tuple[Params, Params], batch: tuple) -> tuple[tuple[Params, Params], Array]:
        decayed, grown = both
        t, *examples = batch
        decayed, one = update(decayed, examples, RATE, DECAY)
        grown, other = update(grown, examples, RATE * (1 - RATE * DECAY) ** (-2.0 * t - 1), 0)
        return (decayed, grown), jnp.abs(one - other).max()

    steps = jnp.arange(len(images), dtype=jnp.float64)
    return np.asarray(lax.scan(step, (params, params), (steps, images, labels))[1])


def judge(results: Results) -> list[Check]:
    """Exact without ε, and not with it."""
    worst = {e: float(np.max(np.array(results[f"{e:g}"], float))) for e in EPSILONS}
    return [
        true(f"ε = 0: logits agree to 10⁻⁶ for {STEPS} steps", worst[0.0], worst[0.0] <= 1e-6),
        true("ε = 10⁻²: they differ by more than 10⁻³", worst[1e-2], worst[1e-2] > 1e-3),
    ]


def draw(results: Results, figure: Figure) -> None:
    """The difference over the steps."""
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    for epsilon, style in zip(EPSILONS, STYLES.values(), strict=False):
        worst = np.max(np.array(results[f"{epsilon:g}"], float), axis=0)
        options: Any = style | {"marker": None}
        axes.plot(worst, label=f"ε = {epsilon:g}", **options)
    finish(axes, "step", "largest difference of the logits", yscale="log")


claim = Claim(
    name="weight-decay",
    title="Weight decay is an exponentially growing learning rate",
    statement="For weights before a batch norm, weight decay λ at the rate η gives the same "
    "networks as no decay at the rate η(1 - ηλ)^(-2t-1).",
    source="Li & Arora 2020, section 2; scale invariance: Ioffe & Szegedy 2015, section 3.3",
    published="An exact equivalence for ε = 0.",
    prediction=f"ε = 0: the logits of both trainings agree to 10⁻⁶ over {STEPS} steps in float64. "
    "ε = 10⁻²: they come apart by more than 10⁻³.",
    protocol=f"3 hidden layers of 100 rectifiers trained both ways on the same batches of 60; "
    f"η = {RATE}, λ = {DECAY} on the hidden weights, none on others.",
    measure=measure,
    judge=judge,
    draw=draw,
    remark="Without ε, both trainings differ by rounding alone (10⁻¹⁴). With ε they do not stay "
    "together, not even with the usual 10⁻⁵: the weights of one shrink, and to small weights the "
    "same ε is larger.",
)
