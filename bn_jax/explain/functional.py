"""`explain`: why evaluation disagrees with training, from statistics alone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from bn_jax.core.population import include
from bn_jax.core.state import BatchNormState
from bn_jax.explain.causes import Api, Cause
from bn_jax.explain.compare import compare, gather
from bn_jax.explain.likeness import Batches
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
        batch_size: the examples of a training batch. Where a feature has several values of each, as
            in a convolution, class-pure batches may pass unnoticed; `explain_linen` and
            `explain_nnx`, which can mix the examples of batches, find them.
        epsilon: of the layers.

    Returns:
        A `Report`: print it, plot it, or read its rows and findings.

    Raises:
        ValueError: there are no batches.

    >>> import jax.numpy as jnp, numpy as np, bn_jax as bn
    >>> data = np.random.default_rng(0).normal(5, 2, (50, 32, 3)).astype(np.float32)
    >>> moments = [{"norm": bn.measure(x)} for x in data]
    >>> stale = {"norm": bn.BatchNormState(jnp.array([4.0, 3, 7]), jnp.ones(3) * 4, jnp.ones(3))}
    >>> print(explain(stale, moments, batch_size=32).verdict)
    other weights (all layers): running statistics do not belong to these weights: ...
    Remedy:
        states = bn_jax.recalibrate(forward, params, states, batches)
    >>> right = bn.population(moments)
    >>> print(explain(right, moments, batch_size=32).verdict)
    Nothing wrong: the running statistics are those of the training data.
    """
    named, _ = jax.tree.flatten_with_path(
        states, is_leaf=lambda node: isinstance(node, BatchNormState)
    )
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]

    def see(batches: Iterable[Any]) -> dict[str, Batches]:
        return dict(zip(names, gathered(include(None, b, "pooled") for b in batches), strict=True))

    remembered = dict(zip(names, (state for _, state in named), strict=True))
    return report(
        remembered,
        see(training),
        None,
        None if evaluation is None else see(evaluation),
        batch_size=batch_size,
        epsilon=dict.fromkeys(names, epsilon),
    )


def report(
    states: Mapping[str, BatchNormState],
    training: Mapping[str, Batches],
    mixed: Mapping[str, Batches] | None,
    evaluation: Mapping[str, Batches] | None,
    *,
    batch_size: int,
    epsilon: Mapping[str, ArrayLike],
    momentum: Mapping[str, float | None] | None = None,
    api: Api = "functional",
    first: Cause | None = None,
) -> Report:
    """`explain`, from what was seen, by the names of layers."""
    rows = {
        name: summarize(
            compare(
                state,
                training[name],
                mixed[name] if mixed else None,
                evaluation[name] if evaluation else None,
                batch_size=batch_size,
                epsilon=float(np.asarray(epsilon[name])),
                momentum=momentum[name] if momentum else None,
            )
        )
        for name, state in states.items()
    }
    return judge(rows, api, first)


def gathered(batches: Iterator[Any]) -> list[Batches]:
    """What each layer saw in all batches.

    Raises:
        ValueError: there are none.
    """
    layers = gather(batches)
    if not layers:
        raise ValueError("there are no batches to compare the running statistics with")
    return layers
