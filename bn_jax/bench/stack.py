"""A stack of convolutions, batch norms and ReLUs, to measure layers inside a network."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax.bench.peers import FUNCTIONAL

Loss = Callable[[Any, Any, Array], tuple[Array, Any]]


def make_stack(name: str, shape: tuple[int, ...], depth: int) -> tuple[Any, Any, Loss]:
    """Make (params, state, loss), with loss(params, state, x) -> (number, new state)."""
    channels = shape[-1]
    layers = [FUNCTIONAL[name](shape, 0.99) for _ in range(depth)]
    keys = jax.random.split(jax.random.key(0), depth)
    kernels = [jax.random.normal(key, (3, 3, channels, channels)) * 0.1 for key in keys]
    params = [(kernel, layer.params) for kernel, layer in zip(kernels, layers, strict=True)]

    def loss(params: Any, state: Any, x: Array) -> tuple[Array, Any]:
        new_state, dtype = [], x.dtype
        for (kernel, affine), layer, old in zip(params, layers, state, strict=True):
            x = lax.conv_general_dilated(
                x, kernel.astype(dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x, new = layer.apply(affine, old, x, True)
            x = jax.nn.relu(x).astype(dtype)
            new_state.append(new)
        return jnp.mean(jnp.square(x.astype(jnp.float32))), new_state

    return params, [layer.state for layer in layers], loss
