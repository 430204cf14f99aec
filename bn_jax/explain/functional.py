"""`explain`: why evaluation disagrees with training, from statistics alone."""

from collections.abc import Iterable
from typing import Any

import jax
from jax.typing import ArrayLike

from bn_jax.core.population import Seen, include
from bn_jax.core.state import BatchNormState
from bn_jax.explain.compare import compare
from bn_jax.explain.report import Report, judge, summarize


def explain(
    states: Any,
    training: Iterable[Any],
    evaluation: Iterable[Any] | None = None,
    *,
    batch_size: int,
    epsilon: ArrayLike = 1e-5,
) -> Report:
    """Why a network's evaluation may disagree with its training.

    Compares, layer by layer, the running statistics with what the layers see in training mode: of
    training batches, and if they are given, of evaluation batches.

    Args:
        states: a tree of `BatchNormState`, the network's layers.
        training: for each of some training batches (50 or more), the moments of what each layer
            normalizes, in training mode: trees of `Moments` like states.
        evaluation: the same of evaluation batches, also in training mode.
        batch_size: the examples of a training batch.
        epsilon: of the layers.

    Returns:
        A `Report`: print it, or read its rows and findings.

    Raises:
        ValueError: there are no batches.

    >>> import jax.numpy as jnp, numpy as np, bn_jax as bn
    >>> data = np.random.default_rng(0).normal(5, 2, (50, 32, 3)).astype(np.float32)
    >>> moments = [{"norm": bn.measure(x)} for x in data]
    >>> stale = {"norm": bn.init(3)[1]._replace(mean=jnp.ones(3), count=jnp.full(3, 9))}
    >>> print(explain(stale, moments, batch_size=32).verdict)
    other weights (all layers): running statistics do not belong to these weights: ...
    >>> right = bn.population(moments)
    >>> print(explain(right, moments, batch_size=32).verdict)
    Nothing wrong: the running statistics are those of the training data.
    """
    trained, evaluated = see(training), None if evaluation is None else see(evaluation)
    return report(states, trained, evaluated, batch_size=batch_size, epsilon=epsilon)


def report(
    states: Any, trained: Any, evaluated: Any, *, batch_size: int, epsilon: ArrayLike = 1e-5
) -> Report:
    """`explain`, from what was seen."""
    named, _ = jax.tree_util.tree_flatten_with_path(
        states, is_leaf=lambda node: isinstance(node, BatchNormState)
    )
    layers = jax.tree.leaves(trained, is_leaf=is_seen)
    others = [None] * len(layers)
    if evaluated is not None:
        others = jax.tree.leaves(evaluated, is_leaf=is_seen)
    rows = {
        jax.tree_util.keystr(path, simple=True, separator="."): summarize(
            compare(state, training, evaluation, epsilon), batch_size
        )
        for (path, state), training, evaluation in zip(named, layers, others, strict=True)
    }
    return judge(rows)


def see(batches: Iterable[Any]) -> Any:
    """What is seen of all batches."""
    seen = None
    for batch in batches:
        seen = include(seen, batch, "pooled")
    if seen is None:
        raise ValueError("there are no batches to compare the running statistics with")
    return seen


def is_seen(node: object) -> bool:
    """Whether a node of a tree is what has been seen of one layer."""
    return isinstance(node, Seen)
