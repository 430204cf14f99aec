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
from flax.traverse_util import unflatten_dict
from jax import Array, lax
from jaxtyping import Int

from bn_jax.core.population import conclude, include
from bn_jax.core.recalibrate import known_or_old, zeros
from bn_jax.core.state import BatchNormState
from bn_jax.data import Dataset
from bn_jax.inference.recalibrate_linen import observed
from bn_jax.train.build import build_model
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.sharding import ONE_DEVICE, Sharding
from bn_jax.train.state import Images, Labels, TrainState, each_average
from bn_jax.train.step import binarize

Statistics = Literal["running", "population", "batch"]
BATCHES = 200
"""Training batches from which population statistics are taken, as is customary."""


def make_score(
    config: TrainConfig, arm: Arm, data: Dataset, sharding: Sharding = ONE_DEVICE
) -> Callable[[TrainState], np.ndarray]:
    """A function: state -> the share of test images that the network labels rightly.

    The shares are [runs, averages]. The configuration's `statistics` say what batch norm normalizes
    by. Training images are for population statistics.
    """
    shape = len(config.runs), config.decays
    size, count = config.batch_size, len(data.test_images)
    by_batch = config.statistics == "batch"
    # Of about one size, so that none is a single image. Activations of all could be gigabytes.
    parts = max(count // size, 1) if by_batch else -(-count // 1000)
    images, labels = data.test_images, data.test_labels.astype(np.int32)
    test = list(zip(*(np.array_split(array, parts) for array in (images, labels)), strict=True))
    if not by_batch:  # no prediction equals a label of -1
        test = [(sharding.examples(x), sharding.examples(y, filler=-1)) for x, y in test]
    batches = min(BATCHES, len(data.train_images) // size)
    train = data.train_images[: batches * size].reshape(batches, size, *data.train_images.shape[1:])

    def network(state: TrainState) -> tuple[nn.Module, Any]:
        model = build_model(config.with_values(state.values), arm)
        return model, {"params": state.params, "batch_stats": state.batch_stats}

    def count_right(state: TrainState, images: Images, labels: Labels) -> Int[Array, ""]:
        model, variables = network(state)
        inputs = binarize(images, config.binarization, jax.random.key(0))
        if by_batch:
            logits, _ = training_mode(model)(variables, inputs)
        else:
            logits: Any = model.apply(variables, inputs, train=False)
        return jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.int32)

    def population(state: TrainState, batches: Images) -> Any:
        model, variables = network(state)

        def see(seen: Any, batch: tuple[Array, Array]) -> tuple[Any, None]:
            key, images = batch
            inputs = binarize(images, config.binarization, key)
            moments = observed(training_mode(model), variables, inputs)[1]
            return include(seen, moments, "pooled"), None

        keys = jax.random.split(jax.random.key(0), len(batches))
        nothing = zeros(jax.eval_shape(lambda: see(None, (keys[0], batches[0]))[0]))
        seen = conclude(lax.scan(see, nothing, (keys, jnp.asarray(batches)))[0], "pooled")
        return jax.tree.map(
            lambda layer, new: known_or_old(BatchNormState(**layer), new)._asdict(),
            *(state.batch_stats, unflatten_dict(seen)),
            is_leaf=lambda node: "var" in node,
        )

    def for_each(function: Callable[..., Any]) -> Callable[..., Any]:
        function = each_average(config, function)
        several = functools.partial(sharding.each_run, function)
        return jax.jit(several if len(config.runs) > 1 else function)

    count_right, population = for_each(count_right), for_each(population)

    def score(state: TrainState) -> np.ndarray:
        if config.statistics == "population" and state.batch_stats:
            state = state._replace(batch_stats=population(state, train))
        right = np.asarray(sum(count_right(state, *chunk) for chunk in test))
        return np.broadcast_to(right.reshape(shape[0], -1), shape) / count

    return score


def training_mode(model: nn.Module) -> Callable[[Any, Array], tuple[Any, Any]]:
    """A network in training mode: variables, inputs -> logits, new batch_stats."""
    return lambda variables, x: model.apply(variables, x, train=True, mutable=["batch_stats"])


def inputs(images: np.ndarray, batch_size: int, binarization: str) -> Iterator[Array]:
    """Images in batches of about one size, so that none is a single image, as inputs."""
    keys = jax.random.split(jax.random.key(0), max(len(images) // batch_size, 1))
    for key, batch in zip(keys, np.array_split(images, len(keys)), strict=True):
        yield binarize(batch, binarization, key)
