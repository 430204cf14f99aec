"""`recalibrate_nnx`: population statistics for the batch norms of a flax.nnx model."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from bn_jax.core.moments import Moments
from bn_jax.core.population import check_estimator, conclude, include
from bn_jax.core.recalibrate import nothing, zeros
from bn_jax.inference.recording import check_batches, check_known, observe, replace
from bn_jax.layers.graph_mode import graph_mode

Path = tuple[Any, ...]


def recalibrate_nnx(
    forward: Callable[[Any, Any], Any],
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    estimator: str = "pooled",
) -> list[str]:
    """Give a flax.nnx model new running statistics, those of the batches, in place.

    Every flax.nnx.BatchNorm, ours or flax's own, that normalizes by the batch gets the mean and
    variance of what it normalized, over all batches. Those that normalize by their running
    statistics (use_running_average=True) keep them.

    Args:
        forward: model, batch -> anything; calls the model as in training. It is compiled, and gets
            a copy of the model; with one function for several calls, it is compiled once.
        model: in training mode (`model.train()`).
        batches: read once, one at a time; each is what forward takes. Training batches, of the size
            and with the augmentation that the network was trained with.
        estimator: "pooled" weighs every value alike, and "paper" every batch
            (`bn_jax.population`).

    Returns:
        The paths of the layers that have new statistics, e.g. ["layers.1"]. Their `count`, where
        there is one, is that of the batches.

    Raises:
        ValueError: no batches, one array in the place of several, or none of the batch norms is
            in training mode.

    >>> import jax
    >>> from flax import nnx
    >>> from bn_jax.layers.nnx import BatchNorm
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), BatchNorm(3, rngs=rngs))
    >>> x = jax.random.normal(jax.random.key(0), (64, 2))
    >>> recalibrate_nnx(lambda model, x: model(x), model, [x[:32], x[32:]])
    ['layers.1']
    """
    states = conclude(see_nnx(forward, model, batches, estimator), estimator)
    check_known(states)
    layers, renewed = batch_norms(model), []
    for path, state in states.items():
        for name, new in state._asdict().items():
            variable = getattr(layers[path], name, None)
            if variable is not None:
                variable.set_value(replace(variable.get_value(), new, state))
        if np.any(state.count):
            renewed.append(".".join(map(str, path)))
    return renewed


def see_nnx(
    forward: Callable[[Any, Any], Any], model: nnx.Module, batches: Iterable[Any], estimator: str
) -> Any:
    """What the batch norms have seen after all batches, by path; the model stays as it is."""
    check_estimator(estimator)
    check_batches(batches)
    with graph_mode():
        graph, random, rest = nnx.split(model, nnx.RngState, ...)
    seen = None
    for batch in batches:
        if seen is None:
            first = functools.partial(step, forward, estimator, graph)
            seen = zeros(jax.eval_shape(first, random, rest, None, batch)[0])
        seen, random = step(forward, estimator, graph, random, rest, seen, batch)
    return seen


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def step(
    forward: Any, estimator: str, graph: Any, random: Any, rest: Any, seen: Any, batch: Any
) -> tuple[Any, Any]:
    """What is seen after one more batch, and the random states after it, in one compiled call."""
    with graph_mode():
        model = nnx.merge(graph, random, rest, copy=True)
    moments = moments_of(forward, model, batch)
    with graph_mode():
        random = nnx.state(model, nnx.RngState)
    return include(seen, moments, estimator), random


def moments_of(
    forward: Callable[[Any, Any], Any], model: nnx.Module, batch: Any
) -> dict[Path, Moments]:
    """What every batch norm of a copy of the model normalized in one pass, by its path.

    The moments are variables of the layer, of the type of its mean and var, which nnx's
    transformations carry out as they do these.
    """
    layers = batch_norms(model)
    for layer in layers.values():
        layer.moments = nnx.BatchStat(nothing(layer.mean.get_value(), layer.var.get_value()))
        object.__setattr__(layer, "__class__", recording(type(layer)))
    forward(model, batch)
    return {path: layer.moments.get_value() for path, layer in layers.items()}


def batch_norms(model: nnx.Module) -> dict[Path, Any]:
    """The batch norms of a model, each once, by their paths."""
    with graph_mode():
        nodes = list(nnx.iter_graph(model))
    return {path: node for path, node in nodes if isinstance(node, nnx.BatchNorm)}


@functools.cache
def recording(kind: type) -> type:
    """A batch norm that also keeps the moments of what it normalizes."""

    class Recording(kind):
        def __call__(self, x: Any, use_running_average: bool | None = None, **kwargs: Any) -> Any:
            y = super().__call__(x, use_running_average, **kwargs)
            given = self.use_running_average if use_running_average is None else use_running_average
            if not given:
                seen = observe(self.moments.get_value(), self, x, kwargs.get("mask"))
                self.moments.set_value(seen)
            return y

    return Recording
