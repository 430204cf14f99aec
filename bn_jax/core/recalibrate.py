"""New running statistics for a whole network of functions: Algorithm 2, in one pass over data.

A network that is called in training mode with `Moments` in the place of its states returns what its
layers have seen (`advance`). `population` makes the new states of it.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.moments import Moments
from bn_jax.core.population import check_estimator, conclude, include
from bn_jax.core.state import BatchNormState, read_state


def recalibrate(
    forward: Callable[[Any, Any, Any], Any],
    params: Any,
    states: Any,
    batches: Iterable[Any],
    *,
    estimator: str = "pooled",
) -> Any:
    """New states for a network, those of the batches, in one pass over them.

    For weights that were averaged (EMA, SWA), pruned or quantized, to which the running statistics
    that training left do not belong.

    Args:
        forward: params, states, batch -> new states: the network in training mode, made of
            `batch_norm` with train=True. It is compiled; with one function for several calls, it
            is compiled once. A layer that is used twice passes its state on, and sees both inputs.
        params: of the network; any tree.
        states: a tree of `BatchNormState`.
        batches: read once, one at a time; each is what forward takes. Training batches, of the size
            and with the augmentation that the network was trained with.
        estimator: "pooled" weighs every value alike, and "paper" every batch (`population`).

    Returns:
        The states, with the mean and variance of what each layer normalized, and the count of
        batches. A layer or feature that has seen nothing keeps its state.

    Raises:
        ValueError: there are no batches, or the estimator is unknown.

    >>> import jax, bn_jax as bn
    >>> params, state = bn.init(3)
    >>> x = jax.random.normal(jax.random.key(0), (64, 3)) * 5 + 2
    >>> def forward(params, state, x):
    ...     return bn.batch_norm(x, params, state, train=True)[1]
    >>> state = recalibrate(forward, params, state, [x[:32], x[32:]])
    >>> bool(jnp.allclose(state.mean, x.mean(0), atol=1e-6)), state.count.tolist()
    (True, [2, 2, 2])
    """
    check_estimator(estimator)
    seen = None
    for batch in batches:
        if seen is None:
            first = jax.eval_shape(partial(step, forward, estimator), params, states, None, batch)
            seen = zeros(first)
        seen = step(forward, estimator, params, states, seen, batch)
    return jax.tree.map(known_or_old, states, conclude(seen, estimator), is_leaf=is_state)


@partial(jax.jit, static_argnums=(0, 1))
def step(forward: Any, estimator: str, params: Any, states: Any, seen: Any, batch: Any) -> Any:
    """What is seen after one more batch, in one compiled call."""
    blank = jax.tree.map(lambda state: nothing(state.mean, state.var), states, is_leaf=is_state)
    return include(seen, forward(params, blank, batch), estimator)


def nothing(mean: Array, var: Array) -> Moments:
    """The moments of no values, for a layer's statistics; no field is None, so merging keeps it."""
    mean, var = (jnp.zeros_like(part, statistics_dtype(part.dtype)) for part in (mean, var))
    like_mean = {"mean", "rest"}
    return Moments(*(mean if name in like_mean else var for name in Moments._fields))


def zeros(shapes: Any) -> Any:
    """What is seen before the first batch, in the shapes of what is seen after it.

    So all batches go through one compiled program, where the first alone would need another.
    """
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def known_or_old(old: BatchNormState, new: BatchNormState) -> BatchNormState:
    """The new state, and the old one of features that have seen nothing."""
    old = read_state(old)
    return BatchNormState(
        *(jnp.where(new.count > 0, b.astype(a.dtype), a) for a, b in zip(old, new, strict=True))
    )


def is_state(node: object) -> bool:
    """Whether a node of a tree is one layer's state."""
    return isinstance(node, BatchNormState)
