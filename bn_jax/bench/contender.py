"""The interface through which layers are measured, and an adapter for functional ones.

A `Functional` is, for example, flax's module with its variables as params and state, haiku's
transformed function, or ours. torch's layer is not a function, so it is a `Layer` itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.conform.oracle import Outcome


class Layer(NamedTuple):
    """A layer together with a batch to measure it on.

    Attributes:
        step: runs forward in training mode and backward: y, the new state, all gradients.
        infer: runs forward by the running statistics.
        wait: waits for a result of step or infer. A GPU works in order, so everything that was
            started before is then done too.
        outcome: the results of a step in float64. mean and var are the running statistics; with
            decay 0 these are the batch's own.

    >>> from bn_jax.bench.peers import PEERS
    >>> x = np.ones((4, 3), np.float32)
    >>> layer = PEERS["bn_jax"](x, dy=x, dtype="float32")
    >>> layer.outcome().y.shape
    (4, 3)
    """

    step: Callable[[], object]
    infer: Callable[[], object]
    wait: Callable[[Any], object]
    outcome: Callable[[], Outcome]


Build = Callable[..., Layer]
"""(x, dy, dtype, decay=0.99) -> Layer. x and dy are float arrays with features last."""


class Functional(NamedTuple):
    """A JAX layer as functions. The leaves of params are scale and bias, nested in any way.

    Attributes:
        params: the values to be differentiated.
        state: the running statistics.
        apply: (params, state, x, train) -> (y, new state).
        moments: state -> (mean, var).
        unbiased: whether var is unbiased.

    >>> import bn_jax as bn
    >>> layer = Functional(
    ...     *bn.init(3),
    ...     apply=lambda params, state, x, train: bn.batch_norm(x, params, state, train=train),
    ...     moments=lambda state: (state.mean, state.var),
    ...     unbiased=True,
    ... )
    >>> y, state = layer.apply(layer.params, layer.state, jnp.ones((4, 3)), True)
    """

    params: Any
    state: Any
    apply: Callable[[Any, Any, Array, bool], tuple[Array, Any]]
    moments: Callable[[Any], tuple[Array, Array]]
    unbiased: bool = False


Shape = tuple[int, ...]
Make = Callable[[Shape, float], Functional]
"""(shape of x, decay) -> a JAX layer."""


def functional_layer(make: Make, *, channels_first: bool = False) -> Build:
    """Turn a JAX layer into a `Build` function."""

    def build(x: np.ndarray, dy: np.ndarray, dtype: str, decay: float = 0.99) -> Layer:
        layer, axis, count = make(x.shape, decay), -1, x.size // x.shape[-1]
        batch, gradient = (jnp.asarray(a, jnp.float32).astype(dtype) for a in (x, dy))
        if channels_first:
            batch, gradient, axis = jnp.moveaxis(batch, -1, 1), jnp.moveaxis(gradient, -1, 1), 1
        step = jax.jit(training_step(layer.apply))
        infer = jax.jit(lambda params, state, x: layer.apply(params, state, x, False)[0])

        def run_step() -> Any:
            return step(layer.params, layer.state, batch, gradient)

        def outcome() -> Outcome:
            y, state, grads, dx = run_step()
            y, dx = np.moveaxis(wide(y), axis, -1), np.moveaxis(wide(dx), axis, -1)
            dscale, dbias = in_order(grads)
            mean, var = map(wide, layer.moments(state))
            biased = var * (count - 1) / count if layer.unbiased else var
            return Outcome(y, dx, dscale, dbias, mean, biased)

        return Layer(
            run_step,
            lambda: infer(layer.params, layer.state, batch),
            jax.block_until_ready,
            outcome,
        )

    return build


def training_step(apply: Callable[..., tuple[Array, Any]]) -> Callable[..., Any]:
    """A function (params, state, x, dy) -> (y, new state, gradient of params, gradient of x)."""

    def step(params: Any, state: Any, x: Array, dy: Array) -> Any:
        y, pullback, state = jax.vjp(
            lambda params, x: apply(params, state, x, True), params, x, has_aux=True
        )
        return y, state, *pullback(dy.astype(y.dtype))

    return step


def in_order(params: Any) -> tuple[np.ndarray, np.ndarray]:
    """The leaves of params as (scale, bias), told apart by their names if they have some."""
    leaves = [
        (jax.tree_util.keystr(path), leaf.reshape(-1))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    (first, a), (_, b) = leaves
    swapped = "bias" in first or "offset" in first
    return (wide(b), wide(a)) if swapped else (wide(a), wide(b))


def wide(a: Array) -> np.ndarray:
    """Convert to float64."""
    return np.asarray(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a).astype(np.float64)
