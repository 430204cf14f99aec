"""Claim 10: AlphaGo Zero's residual tower trains with batch norm where it does not without."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

from bn_jax.layers.linen import BatchNorm
from bn_jax.reproduce.claim import Check, Claim, Results, above, true
from bn_jax.reproduce.plots import finish, line, rounded
from bn_jax.reproduce.study import Study
from bn_jax.reproduce.training import Data, Run, begin, one_by_one
from bn_jax.train.models import TowerClassifier
from bn_jax.train.step import binarize

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
METHODS = {"with batch norm": "with", "zero γ": "third", "without": "without"}
TRAINED, FAILED = 0.9, 0.5


def measure(study: Study) -> Results:
    """Accuracy after training at each rate."""
    results: Results = {}
    for method in METHODS:
        norm = functools.partial(BatchNorm, momentum=0.9)
        normalization = None if method == "without" else norm
        model = TowerClassifier(filters=8, blocks=3, normalization=normalization)

        def make(key: Array, _: Any, model: TowerClassifier = model, method: str = method) -> tuple:
            variables = dict(model.init(key, jnp.zeros((2, 28, 28)), train=False))
            params = variables["params"]
            return zero_last_scales(params) if method == "zero γ" else params, variables.get(
                "batch_stats", {}
            )

        def predict(run: Run, params: Any, images: Array, model: Any = model, **how: Any) -> Any:
            inputs = binarize(images.reshape(-1, 28, 28), "threshold", run.key)
            return model.apply({"params": params, "batch_stats": run.states}, inputs, **how)

        def loss(
            params: Any, run: Run, images: Array, labels: Array, predict: Any = predict
        ) -> Any:
            logits, new = predict(run, params, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new.get("batch_stats", {})

        def look(run: Run, data: Data, predict: Any = predict) -> dict[str, Array]:
            logits = predict(run, run.params, data.test_images[:2000], train=False)
            return {"accuracy": jnp.mean(jnp.argmax(logits, -1) == data.test_labels[:2000])}

        runs = begin(make, study.seeds, learning_rate=RATES)
        options = {"measure": look, "steps": 300, "every": 100, "together": one_by_one}
        _, series = study.train(method, runs, loss, **options)
        finals = series["accuracy"][-1].reshape(len(RATES), study.seeds)
        results[method] = rounded(finals)
    return results


def zero_last_scales(params: Mapping[str, Any]) -> dict[str, Any]:
    """Every block's last batch norm with γ = 0, so that it begins as the identity (Goyal 2017)."""

    def change(path: tuple, leaf: Array) -> Array:
        names = [str(getattr(part, "key", part)) for part in path]
        last = names[-2:] == ["BatchNorm_0", "scale"] and names[-3].startswith("ResidualBlock")
        return jnp.zeros_like(leaf) if last else leaf

    return jax.tree_util.tree_map_with_path(change, params)


def judge(results: Results) -> list[Check]:
    """Whether there is a rate at which one trains and the other does not; the best rates."""
    means = {method: np.mean(table, axis=1) for method, table in results.items()}
    ours, plain = means["with batch norm"], means["without"]
    apart = (ours >= TRAINED) & (plain <= FAILED)
    best = {method: results[method][int(means[method].argmax())] for method in METHODS}
    return [
        true(
            f"rates at which only batch norm trains (≥ {TRAINED} and ≤ {FAILED}): one or more",
            float(apart.sum()),
            bool(apart.any()),
        ),
        above(
            "each at its best rate, batch norm is better", best["with batch norm"], best["without"]
        ),
    ]


def draw(results: Results, figure: Figure) -> None:
    """Accuracy over the rate."""
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    for method, style in METHODS.items():
        line(axes, RATES, results[method], method, style)
    finish(axes, "learning rate", "test accuracy after 300 steps", xscale="log", ylim=(0, 1))


claim = Claim(
    name="tower",
    title="A residual tower trains with batch norm at rates where it does not without",
    statement="AlphaGo Zero's tower of residual blocks trains with batch norm at a learning rate "
    "at which it does not without.",
    source="Silver et al. 2017, Methods (the network); Goyal et al. 2017, section 5.1 (zero γ)",
    published="No ablation is published.",
    prediction="There is a rate at which the tower reaches .9 with batch norm and stays below .5 "
    "without. Each at its best rate, batch norm is better.",
    protocol=f"8 filters, 3 blocks, MNIST, 300 steps of 60 examples, {len(RATES)} learning rates; "
    "accuracy on the first 2,000 test images.",
    measure=measure,
    judge=judge,
    draw=draw,
    remark="At the rate 0.1 the tower reaches .93 with batch norm and .35 without. Without, the "
    "smallest rate tried is the best (.86), so that still smaller ones might do better. Zero γ "
    "does not help three blocks in 300 steps; Goyal et al. used it for deep networks.",
)
