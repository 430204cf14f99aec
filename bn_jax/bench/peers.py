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


def ours(shape: Shape, decay: float, epsilon: float = 1e-5, **axes: Any) -> Functional:
    """bn_jax.batch_norm; with decay 0, the variance is the batch's own, which is biased."""
    import bn_jax as bn

    params, state = bn.init(shape[-1])
    settings = {"average": bn.DebiasedEma(decay), "epsilon": epsilon, "unbiased": decay > 0}

    def apply(
        params: Any, state: Any, x: Array, train: bool, mask: Array | None = None
    ) -> tuple[Array, Any]:
        return bn.batch_norm(x, params, state, train=train, where=mask, **settings, **axes)

    return Functional(
        params,
        state,
        apply,
        moments=lambda state: (state.mean, state.var),
        load=lambda state, mean, var: state._replace(mean=mean, var=var),
    )


def flax(
    shape: Shape, decay: float, epsilon: float = 1e-5, *, fast: bool = True, **axes: Any
) -> Functional:
    """flax.linen.BatchNorm with its defaults; the variance is E[x²] - E[x]²."""
    import flax.linen as nn

    layer = nn.BatchNorm(momentum=decay, epsilon=epsilon, use_fast_variance=fast, **axes)
    variables = layer.init(jax.random.key(0), jnp.zeros(shape), use_running_average=True)

    def apply(
        params: Any, state: Any, x: Array, train: bool, mask: Array | None = None
    ) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": state}
        y, new = layer.apply(
            variables,
            x,
            use_running_average=not train,
            mask=None if mask is None else mask[..., None],
            mutable=["batch_stats"],
        )
        return y, new["batch_stats"]

    return Functional(
        variables["params"],
        variables["batch_stats"],
        apply,
        moments=lambda state: (state["mean"], state["var"]),
        load=lambda _, mean, var: {"mean": mean, "var": var},
    )


def flax_accurate(shape: Shape, decay: float, epsilon: float = 1e-5, **axes: Any) -> Functional:
    """flax.linen.BatchNorm with use_fast_variance=False."""
    return flax(shape, decay, epsilon, fast=False, **axes)


def nnx(shape: Shape, decay: float, epsilon: float = 1e-5, *, dtype: Any = None) -> Functional:
    """flax.nnx.BatchNorm with its defaults, split into its graph and its values."""
    from flax import nnx

    layer = nnx.BatchNorm(shape[-1], momentum=decay, epsilon=epsilon, dtype=dtype, rngs=nnx.Rngs(0))
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def apply(
        params: Any, state: Any, x: Array, train: bool, mask: Array | None = None
    ) -> tuple[Array, Any]:
        merged = nnx.merge(graph, params, state, copy=True)
        mask = None if mask is None else mask[..., None]
        y = merged(x, use_running_average=not train, mask=mask)
        return y, nnx.split(merged, nnx.Param, ...)[2]

    def load(state: Any, mean: Array, var: Array) -> Any:
        merged = nnx.merge(graph, params, state, copy=True)
        merged.mean[...], merged.var[...] = mean, var
        return nnx.split(merged, nnx.Param, ...)[2]

    return Functional(
        params, state, apply, lambda state: (state["mean"][...], state["var"][...]), load
    )


def haiku(shape: Shape, decay: float, epsilon: float = 1e-5) -> Functional:
    """haiku.BatchNorm with its defaults."""
    hk: Any = importlib.import_module("haiku")

    def forward(x: Array, train: bool) -> Array:
        return hk.BatchNorm(True, True, decay_rate=decay, eps=epsilon)(x, train)

    layer = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = layer.init(None, jnp.zeros(shape), True)
    names = [f"batch_norm/~/{name}_ema" for name in ("mean", "var")]

    def moments(state: Any) -> tuple[Array, Array]:
        mean, var = (state[name]["average"].reshape(-1) for name in names)
        return mean, var

    def load(state: Any, *given: Array) -> Any:
        averages = {
            name: state[name] | {"average": value.reshape(state[name]["average"].shape)}
            for name, value in zip(names, given, strict=True)
        }
        return state | averages

    return Functional(params, state, layer.apply, moments, load)


def equinox(shape: Shape, decay: float, epsilon: float = 1e-5) -> Functional:
    """equinox.nn.BatchNorm with mode="batch", whose examples must have channels first."""
    eqx: Any = importlib.import_module("equinox")

    layer, initial = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        shape[-1], axis_name="batch", momentum=decay, eps=epsilon, mode="batch"
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
        mean, var = state.get(layer.batch_state_index)
        shrunk = 1 - decay ** state.get(layer.batch_counter)
        return mean / shrunk, var / shrunk

    def load(state: Any, mean: Array, var: Array) -> Any:
        return state.set(layer.batch_state_index, (mean, var))

    return Functional(params, initial, apply, moments, load)


def keras(shape: Shape, decay: float, epsilon: float = 1e-5) -> Functional:
    """keras.layers.BatchNormalization on the JAX backend, with the same ε as the others."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    layers: Any = importlib.import_module("keras.layers")
    layer = layers.BatchNormalization(momentum=decay, epsilon=epsilon)
    layer.build(shape)
    params = [variable.value for variable in layer.trainable_variables]
    state = [variable.value for variable in layer.non_trainable_variables]

    def apply(
        params: Any, state: Any, x: Array, train: bool, mask: Array | None = None
    ) -> tuple[Array, Any]:
        return layer.stateless_call(params, state, x, training=train, mask=mask)

    return Functional(
        params,
        state,
        apply,
        moments=lambda state: (state[0], state[1]),
        load=lambda _, mean, var: [mean, var],
    )


def torch(x: np.ndarray, dy: np.ndarray, dtype: str, decay: float = 0.99) -> Layer:
    """torch.nn.BatchNorm1d or 2d with channels last in memory, on the kind of device JAX uses."""
    torch: Any = importlib.import_module("torch")
    layer = torch_layer(x.shape, decay)
    batch, gradient = (torch_tensor(a, dtype) for a in (x, dy))
    batch.requires_grad_()

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

    return Layer(step, infer, lambda _: torch_device() == "cpu" or torch.cuda.synchronize())


def torch_layer(shape: Shape, decay: float, epsilon: float = 1e-5) -> Any:
    """Torch's layer for data of a shape with features last."""
    torch: Any = importlib.import_module("torch")
    kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
    return kind(shape[-1], momentum=1 - decay, eps=epsilon).to(torch_device())


def torch_tensor(a: np.ndarray, dtype: str) -> Any:
    """A tensor with features on axis 1, which are still last in memory."""
    torch: Any = importlib.import_module("torch")
    tensor = torch.from_numpy(np.ascontiguousarray(a, np.float32))
    tensor = tensor.to(torch_device(), getattr(torch, dtype))
    return tensor.permute(0, 3, 1, 2) if a.ndim == 4 else tensor


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
