"""The batch norm layers of all installed libraries, behind the interface of `contender`.

All have their library's defaults, except for the decay of the moving average: 0.99 for all, or 0 to
read the statistics of a single batch.

To add a JAX layer, write it as a `Functional` and add it to FUNCTIONAL. To add another, write it as
a `Build` and add it to PEERS.
"""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.bench.contender import Build, Functional, Layer, Make, Shape, functional_layer
from bn_jax.conform.oracle import Outcome


def ours(shape: Shape, decay: float, *, axis_name: str | None = None) -> Functional:
    """bn_jax.batch_norm."""
    import bn_jax as bn

    params, state = bn.init(shape[-1])
    average = bn.DebiasedEma(decay)

    def apply(params: Any, state: Any, x: Array, train: bool) -> tuple[Array, Any]:
        return bn.batch_norm(x, params, state, train=train, average=average, axis_name=axis_name)

    return Functional(params, state, apply, lambda s: (s.mean, s.var), unbiased=True)


def flax(
    shape: Shape, decay: float, *, fast: bool = True, axis_name: str | None = None
) -> Functional:
    """flax.linen.BatchNorm with its defaults; the variance is E[x²] - E[x]²."""
    import flax.linen as nn

    layer = nn.BatchNorm(momentum=decay, use_fast_variance=fast, axis_name=axis_name)
    variables = layer.init(jax.random.key(0), jnp.zeros(shape), use_running_average=True)

    def apply(params: Any, state: Any, x: Array, train: bool) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": state}
        y, new = layer.apply(variables, x, use_running_average=not train, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return Functional(
        variables["params"], variables["batch_stats"], apply, lambda s: (s["mean"], s["var"])
    )


def flax_accurate(shape: Shape, decay: float) -> Functional:
    """flax.linen.BatchNorm with use_fast_variance=False."""
    return flax(shape, decay, fast=False)


def nnx(shape: Shape, decay: float) -> Functional:
    """flax.nnx.BatchNorm with its defaults, split into its graph and its values."""
    from flax import nnx

    layer = nnx.BatchNorm(shape[-1], momentum=decay, rngs=nnx.Rngs(0))
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def apply(params: Any, state: Any, x: Array, train: bool) -> tuple[Array, Any]:
        merged = nnx.merge(graph, params, state, copy=True)
        y = merged(x, use_running_average=not train)
        return y, nnx.split(merged, nnx.Param, ...)[2]

    return Functional(params, state, apply, lambda s: (s["mean"][...], s["var"][...]))


def haiku(shape: Shape, decay: float) -> Functional:
    """haiku.BatchNorm with its defaults."""
    hk: Any = importlib.import_module("haiku")

    def forward(x: Array, train: bool) -> Array:
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=decay)(x, train)

    layer = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = layer.init(None, jnp.zeros(shape), True)

    def moments(state: Any) -> tuple[Array, Array]:
        mean, var = (
            state[f"batch_norm/~/{name}_ema"]["average"].reshape(-1) for name in ("mean", "var")
        )
        return mean, var

    return Functional(params, state, layer.apply, moments)


def equinox(shape: Shape, decay: float) -> Functional:
    """equinox.nn.BatchNorm with mode="batch", whose examples must have channels first."""
    eqx: Any = importlib.import_module("equinox")

    layer, initial = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        shape[-1], axis_name="batch", momentum=decay, mode="batch"
    )
    params, rest = eqx.partition(layer, eqx.is_inexact_array)

    def apply(params: Any, state: Any, x: Array, train: bool) -> tuple[Array, Any]:
        module = eqx.combine(params, rest)
        batched = jax.vmap(
            lambda x, state: module(x, state, inference=not train),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )
        return batched(x, state)

    def moments(state: Any) -> tuple[Array, Array]:
        return state.get(layer.batch_state_index)

    return Functional(params, initial, apply, moments)


def keras(shape: Shape, decay: float) -> Functional:
    """keras.layers.BatchNormalization on the JAX backend, with the same ε as the others."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    layers: Any = importlib.import_module("keras.layers")
    layer = layers.BatchNormalization(momentum=decay, epsilon=1e-5)
    layer.build(shape)
    params = [variable.value for variable in layer.trainable_variables]
    state = [variable.value for variable in layer.non_trainable_variables]

    def apply(params: Any, state: Any, x: Array, train: bool) -> tuple[Array, Any]:
        return layer.stateless_call(params, state, x, training=train)

    return Functional(params, state, apply, lambda state: (state[0], state[1]))


def torch(x: np.ndarray, dy: np.ndarray, dtype: str, decay: float = 0.99) -> Layer:
    """torch.nn.BatchNorm1d or 2d with channels last in memory, on the kind of device JAX uses."""
    torch: Any = importlib.import_module("torch")
    device = torch_device()
    images = x.ndim == 4
    kind = torch.nn.BatchNorm2d if images else torch.nn.BatchNorm1d
    layer = kind(x.shape[-1], momentum=1 - decay).to(device)

    def prepared(a: np.ndarray) -> Any:
        tensor = torch.from_numpy(np.ascontiguousarray(a, np.float32))
        tensor = tensor.to(device, getattr(torch, dtype))
        return (
            tensor.permute(0, 3, 1, 2) if images else tensor
        )  # a view: memory stays channels last

    def restored(tensor: Any) -> np.ndarray:
        tensor = tensor.detach().permute(0, 2, 3, 1) if images else tensor.detach()
        return tensor.double().cpu().numpy()

    batch, gradient = prepared(x).requires_grad_(), prepared(dy)

    def step() -> Any:
        layer.zero_grad(set_to_none=True)
        batch.grad = None
        y = layer(batch)
        y.backward(gradient)
        return y

    def infer() -> Any:
        layer.eval()
        with torch.no_grad():
            y = layer(batch)
        layer.train()
        return y

    def outcome() -> Outcome:
        y, count = step(), x.size // x.shape[-1]
        dscale, dbias = (p.grad.double().cpu().numpy() for p in (layer.weight, layer.bias))
        mean, var = (a.double().cpu().numpy() for a in (layer.running_mean, layer.running_var))
        dx = restored(batch.grad)
        return Outcome(restored(y), dx, dscale, dbias, mean, var * (count - 1) / count)

    return Layer(step, infer, lambda _: device == "cpu" or torch.cuda.synchronize(), outcome)


def torch_device() -> str:
    """The device for torch: a GPU if JAX uses one and torch can."""
    torch: Any = importlib.import_module("torch")
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


OURS = "bn_jax"

FUNCTIONAL: dict[str, Make] = {
    OURS: ours,
    "flax": flax,
    "flax accurate": flax_accurate,
    "nnx": nnx,
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
}
"""JAX layers by name; "flax accurate" is flax with use_fast_variance=False."""

PACKAGES = {OURS: "jax", "flax accurate": "flax", "nnx": "flax"}
"""The package that a layer needs, if its name differs from the layer's."""

PEERS: dict[str, Build] = {
    **{
        name: functional_layer(make, channels_first=name == "equinox")
        for name, make in FUNCTIONAL.items()
    },
    "torch": torch,
}
"""Build functions by name."""


def installed() -> list[str]:
    """The names of PEERS whose package is installed."""
    return [name for name in PEERS if importlib.util.find_spec(PACKAGES.get(name, name))]
