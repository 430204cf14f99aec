"""`explain_linen` and `explain_nnx`: why a Flax model's evaluation disagrees with its training."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike

from bn_jax.core.population import conclude
from bn_jax.core.state import BatchNormState
from bn_jax.explain.functional import report
from bn_jax.explain.report import Report
from bn_jax.inference.recalibrate_linen import see_linen
from bn_jax.inference.recalibrate_nnx import batch_norms, see_nnx
from bn_jax.inference.recording import check_known


def explain_linen(
    forward: Callable[[Any, Any], tuple[Any, Any]],
    variables: Mapping[str, Any],
    training: Iterable[Any],
    evaluation: Iterable[Any] | None = None,
    *,
    batch_size: int | None = None,
    epsilon: ArrayLike = 1e-5,
) -> Report:
    """Why a flax.linen model's evaluation may disagree with its training.

    Args:
        forward: variables, batch -> what `model.apply` returns in training mode, with mutable
            batch_stats, as in `recalibrate_linen`. The layers are ours or flax's own.
        variables: with the collection batch_stats.
        training: some training batches, 50 or more; each is what forward takes.
        evaluation: some evaluation batches. They go through the model in training mode too.
        batch_size: the examples of a training batch; None for the length of its first array.
        epsilon: of the layers.

    Returns:
        A `Report`: print it. Layers that evaluate in forward are left out.

    Raises:
        ValueError: no batches, or none of the batch norms is in training mode.
    """
    flat = flatten_dict(variables["batch_stats"])
    states = {
        path[:-1]: state_of(flat[*path[:-1], "mean"], flat[path])
        for path in flat
        if path[-1] == "var"
    }

    def see(batches: Iterable[Any]) -> Any:
        return see_linen(forward, variables, batches, "pooled")

    return explained(see, states, training, evaluation, batch_size, epsilon)


def explain_nnx(
    forward: Callable[[Any, Any], Any],
    model: nnx.Module,
    training: Iterable[Any],
    evaluation: Iterable[Any] | None = None,
    *,
    batch_size: int | None = None,
    epsilon: ArrayLike = 1e-5,
) -> Report:
    """Why a flax.nnx model's evaluation may disagree with its training.

    Args:
        forward: model, batch -> anything; calls the model as in training, as in `recalibrate_nnx`.
            The layers are ours or flax's own.
        model: in training mode (`model.train()`); it stays as it is.
        training: some training batches, 50 or more; each is what forward takes.
        evaluation: some evaluation batches. They go through the model in training mode too.
        batch_size: the examples of a training batch; None for the length of its first array.
        epsilon: of the layers.

    Returns:
        A `Report`: print it. Layers that evaluate in forward are left out.

    Raises:
        ValueError: no batches, or none of the batch norms is in training mode.
    """
    layers = batch_norms(model).items()
    states = {
        path: state_of(layer.mean.get_value(), layer.var.get_value()) for path, layer in layers
    }

    def see(batches: Iterable[Any]) -> Any:
        return see_nnx(forward, model, batches, "pooled")

    return explained(see, states, training, evaluation, batch_size, epsilon)


def explained(
    see: Callable[[Iterable[Any]], Any],
    states: dict[Any, BatchNormState],
    training: Iterable[Any],
    evaluation: Iterable[Any] | None,
    batch_size: int | None,
    epsilon: ArrayLike,
) -> Report:
    """The report on what is seen of both kinds of batches."""
    batches = iter(training)
    first = list(itertools.islice(batches, 1))
    trained = see(itertools.chain(first, batches))
    check_known(conclude(trained, "pooled"))
    evaluated = None if evaluation is None else see(evaluation)
    used = {path for path, seen in trained.items() if np.any(seen.means.count)}

    def named(layers: Any) -> Any:
        return {".".join(map(str, path)): layers[path] for path in states if path in used}

    batch_size = len(jax.tree.leaves(first)[0]) if batch_size is None else batch_size
    evaluated = None if evaluated is None else named(evaluated)
    return report(named(states), named(trained), evaluated, batch_size=batch_size, epsilon=epsilon)


def state_of(mean: Any, var: Any) -> BatchNormState:
    """A layer's statistics."""
    return BatchNormState(mean, var, jnp.zeros(jnp.shape(mean), jnp.int32))
