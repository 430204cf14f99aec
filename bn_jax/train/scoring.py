"""What a trained network scores: by its running statistics, the population's, or each batch's own.

Three instances: evaluation as usual; Algorithm 2 of Ioffe & Szegedy (2015), which measures trained
networks; and the mode of training, which shows whether the running statistics are to blame.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.data import Dataset
from bn_jax.inference.recalibrate import recalibrate_linen
from bn_jax.train.step import Binarization, TrainState, accuracy, binarize

Forward = Callable[[Any, Array], tuple[Any, Any]]
Statistics = Literal["running", "population", "batch"]
BATCHES = 200
"""Training batches from which population statistics are taken, as is customary."""


def score(
    model: nn.Module,
    binarization: Binarization,
    batch_size: int,
    state: TrainState,
    data: Dataset,
    statistics: Statistics = "running",
) -> float:
    """The share of test images that a network labels rightly.

    Args:
        model: takes inputs and `train`.
        binarization: how images become inputs.
        batch_size: images per batch, where batches are measured.
        state: of the network; without batch_stats, all statistics give the same score.
        data: its training images are for population statistics.
        statistics: what normalizes: "running", "population" or "batch".
    """
    test = data.test_images, data.test_labels
    if not state.batch_stats or statistics == "running":
        return accuracy(model, binarization, state, *test)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    forward = training_mode(model)
    if statistics == "population":
        images = data.train_images[: BATCHES * batch_size]
        variables = recalibrate_linen(forward, variables, inputs(images, batch_size, binarization))
        return accuracy(
            model, binarization, state._replace(batch_stats=variables["batch_stats"]), *test
        )
    batches = inputs(data.test_images, batch_size, binarization)
    predicted = [predict(forward, variables, batch) for batch in batches]
    return float(np.mean(np.concatenate(predicted) == data.test_labels))


@functools.cache
def training_mode(model: nn.Module) -> Forward:
    """A network in training mode; the same function each time, so that it is compiled once."""

    def forward(variables: Any, inputs: Array) -> tuple[Any, Any]:
        return model.apply(variables, inputs, train=True, mutable=["batch_stats"])

    return forward


@functools.partial(jax.jit, static_argnums=0)
def predict(forward: Forward, variables: Any, batch: Array) -> Array:
    """The labels that a network gives."""
    return jnp.argmax(forward(variables, batch)[0], -1)


def inputs(images: np.ndarray, batch_size: int, binarization: Binarization) -> Iterator[Array]:
    """Images in batches of about one size, so that none is a single image, as inputs."""
    keys = jax.random.split(jax.random.key(0), max(len(images) // batch_size, 1))
    for key, batch in zip(keys, np.array_split(images, len(keys)), strict=True):
        yield binarize(jnp.asarray(batch), binarization, key)
