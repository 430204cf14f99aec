"""Gradient accumulation: one optimizer step, and one batch for the memory, from several passes.

A batch that does not fit into memory goes through the network in parts. Each is normalized by its
own statistics, which is ghost batch norm with groups of that size; the gradients are averaged; and
the running statistics move once, by the moments of all parts merged, as if they had been measured
together.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from bn_jax.core.averages import Average, Ema
from bn_jax.core.moments import Moments, merge
from bn_jax.core.state import BatchNormState, advance
from bn_jax.layers.linen import BatchNorm
from bn_jax.train.step import Gradients, Labels, TrainState, cross_entropy


def accumulate(
    micro_batches: int, average: Average, spread: Callable[[Any], Any] = lambda parts: parts
) -> Gradients:
    """What `make_train_step` takes as gradients, in that many passes over parts of the batch.

    Args:
        micro_batches: how many; divides the batch.
        average: of the running statistics.
        spread: places [micro_batches, examples, ...] on the devices.
    """

    def gradients(
        model: nn.Module, state: TrainState, inputs: Float[Array, "batch ..."], labels: Labels
    ) -> tuple[Float[Array, ""], Any, Any]:
        measuring = measure_only(model)
        fresh = jax.tree.map(jnp.zeros_like, state.batch_stats)

        def loss_fn(params: Any, part: tuple[Array, Labels]) -> tuple[Array, Any]:
            logits, updates = measuring.apply(
                {"params": params, "batch_stats": fresh},
                part[0],
                train=True,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: isinstance(module, BatchNorm),
            )
            moments = read_moments(updates.get("batch_stats", {}), updates.get("intermediates", {}))
            return cross_entropy(logits, part[1]), moments

        def add(total: Any, part: tuple[Array, Labels]) -> tuple[Any, None]:
            (loss, moments), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, part)
            sums = jax.tree.map(jnp.add, total[:2], (loss, grads))
            return (*sums, jax.tree.map(merge, total[2], moments, is_leaf=is_moments)), None

        parts = jax.tree.map(lambda a: a.reshape(micro_batches, -1, *a.shape[1:]), (inputs, labels))
        nothing = jax.tree.map(jnp.zeros_like, state.params)
        unseen = jax.tree.map(no_moments, state.batch_stats, is_leaf=is_layer)
        (loss, grads, moments), _ = lax.scan(add, (jnp.zeros(()), nothing, unseen), spread(parts))
        loss, grads = jax.tree.map(lambda total: total / micro_batches, (loss, grads))
        remember = functools.partial(advance_layer, average=average)
        stats = jax.tree.map(remember, state.batch_stats, moments, is_leaf=is_layer)
        return loss, stats, grads

    return gradients


def measure_only(model: nn.Module) -> nn.Module:
    """The network with batch norms that leave in `batch_stats` what they measure, and no past."""
    normalization = getattr(model, "normalization", None)
    if normalization is None:
        return model
    return model.clone(
        normalization=functools.partial(normalization, average=Ema(0.0), unbiased=False)
    )


def read_moments(batch_stats: Any, outputs: Any) -> Any:
    """The moments of each batch norm, from what it remembers and the size of what it returned."""

    def read(layer: Mapping[str, Array], output: Mapping[str, tuple[Array]]) -> Moments:
        # m is the batch, times the locations of a convolution; 0 where the moments are not finite,
        # which the layer has not counted.
        values = output["__call__"][0].size // layer["mean"].size
        count = layer["count"].astype(layer["var"].dtype) * values
        return lax.stop_gradient(Moments(layer["mean"], layer["var"], count))

    return jax.tree.map(read, batch_stats, outputs, is_leaf=is_layer)


def no_moments(layer: Mapping[str, Array]) -> Moments:
    """The moments of nothing, in the shapes of a layer."""
    nothing = jnp.zeros_like(layer["var"])
    mean = jnp.zeros_like(layer["mean"])
    return Moments(mean, nothing, nothing, rest=mean)


def advance_layer(
    layer: Mapping[str, Array], moments: Moments, average: Average
) -> dict[str, Array]:
    """The running statistics of a layer after one more batch, whose moments are given."""
    return advance(BatchNormState(**layer), moments, average, unbiased=True)._asdict()


def is_layer(node: Any) -> bool:
    """Whether a part of `batch_stats` is that of one batch norm."""
    return isinstance(node, Mapping) and "var" in node


def is_moments(node: Any) -> bool:
    """Whether a part of a tree is the moments of one batch norm."""
    return isinstance(node, Moments)
