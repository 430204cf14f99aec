"""From a configuration to the objects that train: model, normalization, optimizer."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bn_jax.core.averages import Average, CumulativeAverage, DebiasedEma, Ema
from bn_jax.layers.linen import BatchNorm
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.models import CNN, MLP, TowerClassifier


def build_average(config: TrainConfig) -> Average:
    """The moving average of the running statistics."""
    if config.average == "cumulative":
        return CumulativeAverage()
    return {"ema": Ema, "debiased": DebiasedEma}[config.average](config.decay)


def build_model(config: TrainConfig, arm: Arm) -> nn.Module:
    """The network of an arm."""
    dtype = jnp.dtype(config.precision)
    normalization = functools.partial(
        BatchNorm,
        average=build_average(config),
        unbiased=config.renorm is None,
        epsilon=config.epsilon,
        group_size=config.group_size,
        renorm=config.renorm,
        dtype=dtype,
    )
    # A new normalizer joins here.
    chosen = normalization if arm == "batch" else None
    options: dict[str, Any] = {"normalization": chosen, "dtype": dtype}
    if config.init_std is not None:
        options["kernel_init"] = nn.initializers.normal(config.init_std)
    if config.model == "tower":
        return TowerClassifier(filters=config.filters, blocks=config.blocks, **options)
    options |= {"activation": getattr(nn, config.activation), "placement": config.placement}
    if config.model == "cnn":
        return CNN(filters=config.filters, **options)
    return MLP(hidden=config.hidden, **options)


def build_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer with its schedule, and weight decay on kernels only."""
    steps, rate = max(config.steps, 1), config.learning_rate
    schedule = {
        "constant": lambda: optax.constant_schedule(rate),
        "cosine": lambda: optax.cosine_decay_schedule(rate, steps),
        "exponential": lambda: optax.exponential_decay(rate, steps, 0.01),
    }[config.schedule]()
    direction = {
        "sgd": optax.identity,
        "momentum": functools.partial(optax.trace, decay=0.9),
        "adam": optax.scale_by_adam,
    }[config.optimizer]()
    decay = optax.add_decayed_weights(config.weight_decay, mask=is_kernel)
    # Of a traced decay, nobody knows whether it is 0.
    none = isinstance(config.weight_decay, int | float) and not config.weight_decay
    return optax.chain(
        direction,
        optax.identity() if none else decay,
        optax.scale_by_learning_rate(schedule),
    )


def is_kernel(params: optax.Params) -> optax.Params:
    """True for the leaves that weight decay shrinks: kernels, not biases, not scale."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
