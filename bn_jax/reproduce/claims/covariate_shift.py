"""The explanation on trial: does batch norm reduce internal covariate shift?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import bn_jax as bn
from bn_jax.reproduce.claim import Check, Claim, Results, above
from bn_jax.reproduce.network import Classifier, plain
from bn_jax.reproduce.plots import finish, line, rounded
from bn_jax.reproduce.study import Study
from bn_jax.reproduce.training import Data, Run, begin

ARMS = {"with": bn.batch_norm, "without": plain}
LABELS = {"with": "with batch norm", "without": "without"}


def measure(study: Study) -> Results:
    """Accuracy, and how much a step of the layers below changes a layer's gradient."""
    results: Results = {}
    for arm, normalize in ARMS.items():
        network = Classifier(normalize)

        def look(run: Run, data: Data, network: Classifier = network) -> dict[str, Array]:
            batch = data.images[:1000], data.labels[:1000]

            def gradients(params: Any) -> Any:
                return jax.grad(lambda p: network.loss(p, run, *batch)[0])(params)

            before = gradients(run.params)
            stepped = jax.tree.map(
                lambda p, g: p - run.values["learning_rate"] * g, run.params, before
            )
            # The layers below have taken their step, the last hidden one and the logits not yet.
            mixed = run.params._replace(
                kernels=[*stepped.kernels[:-2], *run.params.kernels[-2:]],
                affine=[*stepped.affine[:-1], run.params.affine[-1]],
            )
            one, other = (g.kernels[-2] for g in (before, gradients(mixed)))
            cosine = jnp.vdot(one, other) / (jnp.linalg.norm(one) * jnp.linalg.norm(other))
            return {
                **network.score(run, data),
                "change": jnp.linalg.norm(one - other) / jnp.linalg.norm(one),
                "cosine": cosine,
            }

        runs = begin(network.make, study.seeds, init_std=0.04, learning_rate=0.15)
        options = {"measure": look, "steps": 10_000, "every": 500}
        _, series = study.train(LABELS[arm], runs, network.loss, **options)
        results[arm] = {name: rounded(series[name]) for name in ("accuracy", "change", "cosine")}
        results["step"] = series["step"].tolist()
    return results


def judge(results: Results) -> list[Check]:
    """What the explanation predicts: better accuracy by less shift."""
    final = {arm: results[arm]["accuracy"][-1] for arm in ARMS}
    changes = {arm: np.array(results[arm]["change"][1:], float) for arm in ARMS}
    shift = {arm: np.median(change, axis=0).tolist() for arm, change in changes.items()}
    return [
        above(
            "with batch norm, accuracy after 10,000 steps is higher",
            final["with"],
            final["without"],
        ),
        above("and the gradient changes less (without - with)", shift["without"], shift["with"]),
    ]


def draw(results: Results, figure: Figure) -> None:
    """Accuracy, and the gradient's change."""
    figure.set_size_inches(9, 3.6)
    left, right = figure.subplots(1, 2)
    for arm, label in LABELS.items():
        line(left, results["step"], results[arm]["accuracy"], label, arm)
        line(right, results["step"], results[arm]["change"], label, arm)
    finish(left, "step", "test accuracy", ylim=(0, 1))
    finish(right, "step", "relative change of the gradient", yscale="log")


claim = Claim(
    name="covariate-shift",
    title="Batch norm works by reducing internal covariate shift",
    statement="Batch norm trains faster because the distribution that a layer sees changes less "
    "when the layers below it change.",
    source="Ioffe & Szegedy 2015, sections 1 and 2; disputed by Santurkar et al. 2018, section 2.3",
    published="Santurkar et al., with the measure used here: no reduction by batch norm, and often "
    "an increase.",
    prediction="The explanation predicts a smaller change of the gradient with batch norm. As "
    "Santurkar et al. found, we expect that this does not hold.",
    protocol="The network of Figure 1. Every 500 steps, on 1,000 training examples: the gradient "
    "of the last hidden layer's weights before and after all layers below have taken their step; "
    "‖difference‖ ÷ ‖gradient‖, its median over training.",
    measure=measure,
    judge=judge,
    draw=draw,
)
