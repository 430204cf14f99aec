"""What a batch norm layer must offer to be measured, and how a functional one offers it.

Three instances of a `Functional`: flax's module with its variables as params and state, haiku's
transformed function, ours. torch's layer, which is no function, is a `Layer` by itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.bench.oracle import Outcome


class Layer(NamedTuple):
    """A layer with its batch at hand.

    Attributes:
        step: forward in training mode and backward: y, the new state, all gradients.
        infer: forward by the running statistics.
        wait: for what step or infer has returned, and so on a GPU, whose work is done in order,
            for all that was begun before.
        outcome: of a step, in float64; mean and var are those the layer remembers, which at decay 0
            are the batch's own.
    """

    step: Callable[[], object]
    infer: Callable[[], object]
    wait: Callable[[Any], object]
    outcome: Callable[[], Outcome]


Build = Callable[..., Layer]
"""(x, dy, dtype, decay=0.99) -> Layer; x and dy are float arrays with the features last."""


class Functional(NamedTuple):
    """A JAX layer as functions; params has the leaves scale and bias, however they are nested.

    Attributes:
        params: what is differentiated.
        state: running statistics.
        apply: (params, state, x, train) -> (y, new state).
        moments: state -> (mean, var).
        unbiased: whether var is.
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
    """The build function of a JAX layer."""

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
    """(params, state, x, dy) -> (y, new state, gradient of params, gradient of x)."""

    def step(params: Any, state: Any, x: Array, dy: Array) -> Any:
        y, pullback, state = jax.vjp(
            lambda params, x: apply(params, state, x, True), params, x, has_aux=True
        )
        return y, state, *pullback(dy.astype(y.dtype))

    return step


def in_order(params: Any) -> tuple[np.ndarray, np.ndarray]:
    """(scale, bias), by name where they have one."""
    leaves = [
        (jax.tree_util.keystr(path), leaf.reshape(-1))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    (first, a), (_, b) = leaves
    swapped = "bias" in first or "offset" in first
    return (wide(b), wide(a)) if swapped else (wide(a), wide(b))


def wide(a: Array) -> np.ndarray:
    """As float64."""
    return np.asarray(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a).astype(np.float64)
