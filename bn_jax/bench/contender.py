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


class Layer(NamedTuple):
    """A layer together with a batch to measure it on.

    Attributes:
        step: runs forward in training mode and backward: y, the new state, all gradients.
        infer: runs forward by the running statistics.
        wait: waits for a result of step or infer. A GPU works in order, so everything that was
            started before is then done too.

    >>> from bn_jax.bench.peers import PEERS
    >>> x = np.ones((4, 3), np.float32)
    >>> layer = PEERS["bn_jax"](x, dy=x, dtype="float32")
    >>> layer.wait(layer.infer()).shape
    (4, 3)
    """

    step: Callable[[], object]
    infer: Callable[[], object]
    wait: Callable[[Any], object]


Build = Callable[..., Layer]
"""(x, dy, dtype, decay=0.99) -> Layer. x and dy are float arrays with features last."""


class Functional(NamedTuple):
    """A JAX layer as functions. The leaves of params are scale and bias, nested in any way.

    Attributes:
        params: the values to be differentiated.
        state: the running statistics.
        apply: (params, state, x, train) -> (y, new state). A fifth argument may be a mask.
        moments: state -> (mean, var), as inference uses them.
        load: (state, mean, var) -> state, whose inference uses mean and var.

    >>> import bn_jax as bn
    >>> layer = Functional(
    ...     *bn.init(3),
    ...     apply=lambda params, state, x, train: bn.batch_norm(x, params, state, train=train),
    ...     moments=lambda state: (state.mean, state.var),
    ...     load=lambda state, mean, var: state._replace(mean=mean, var=var),
    ... )
    >>> y, state = layer.apply(layer.params, layer.state, jnp.ones((4, 3)), True)
    """

    params: Any
    state: Any
    apply: Callable[..., tuple[Array, Any]]
    moments: Callable[[Any], tuple[Array, Array]]
    load: Callable[[Any, Array, Array], Any]


Shape = tuple[int, ...]
Make = Callable[..., Functional]
"""(shape of x, decay, epsilon=1e-5) -> a JAX layer."""


def functional_layer(make: Make, *, channels_first: bool = False) -> Build:
    """Turn a JAX layer into a `Build` function."""

    def build(x: np.ndarray, dy: np.ndarray, dtype: str, decay: float = 0.99) -> Layer:
        layer = make(x.shape, decay)
        batch, gradient = (jnp.asarray(a, jnp.float32).astype(dtype) for a in (x, dy))
        if channels_first:
            batch, gradient = jnp.moveaxis(batch, -1, 1), jnp.moveaxis(gradient, -1, 1)
        step = jax.jit(training_step(layer.apply))
        infer = jax.jit(lambda params, state, x: layer.apply(params, state, x, False)[0])
        return Layer(
            lambda: step(layer.params, layer.state, batch, gradient),
            lambda: infer(layer.params, layer.state, batch),
            jax.block_until_ready,
        )

    return build


def training_step(apply: Callable[..., tuple[Array, Any]]) -> Callable[..., Any]:
    """A function (params, state, x, dy) -> (y, new state, gradient of params, gradient of x)."""

    def step(params: Any, state: Any, x: Array, dy: Array, *mask: Array) -> Any:
        y, pullback, state = jax.vjp(
            lambda params, x: apply(params, state, x, True, *mask), params, x, has_aux=True
        )
        return y, state, *pullback(dy.astype(y.dtype))

    return step
