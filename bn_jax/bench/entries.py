"""The peers as `bn-jax conform` tries them, e.g. `bn-jax conform bn_jax.bench.entries:flax`.

Each is an object with the functions of `conform.contract`, as far as the library offers them.
"""

import functools
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.bench import peers
from bn_jax.bench.contender import Functional, Make, Shape, training_step
from bn_jax.bench.peers import FUNCTIONAL, OURS, torch_layer, torch_tensor

Arrays = tuple[np.ndarray, ...]


class FunctionalEntry:
    """A JAX layer.

    >>> y, mean, var = flax.batch_norm(np.ones((4, 3), np.float32), np.ones(3), np.zeros(3), 1e-5)
    >>> mean.tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(self, make: Make, *, axis: int = -1, unbiased: bool = False):
        self.make, self.axis, self.unbiased = make, axis, unbiased

    @functools.cache  # noqa: B019
    def compiled(self, shape: Shape, decay: float, epsilon: float) -> tuple[Functional, Any, Any]:
        """The layer, its step with all gradients, and its update."""
        layer = self.make(shape, decay, epsilon)
        update = jax.jit(lambda *inputs: layer.apply(*inputs[:3], True, *inputs[3:])[1])
        return layer, jax.jit(training_step(layer.apply)), update

    def step(self, x: Any, scale: Any, bias: Any, epsilon: float, dy: Any, mask: Any) -> Any:
        """y, the state, the gradients, and the layer."""
        layer, step, _ = self.compiled(x.shape, 0.0, epsilon)
        params = put_in_order(layer.params, scale, bias)
        masks = () if mask is None else (self.checked(layer, mask),)
        return *step(params, layer.state, self.inward(x), self.inward(dy), *masks), layer

    def batch_norm(self, x: Any, scale: Any, bias: Any, epsilon: float, mask: Any = None) -> Arrays:
        """The layer in training."""
        y, state, _, _, layer = self.step(x, scale, bias, epsilon, np.zeros_like(x), mask)
        return self.outward(y), *map(wide, layer.moments(state))

    def gradient(
        self, x: Any, scale: Any, bias: Any, epsilon: float, dy: Any, mask: Any = None
    ) -> Arrays:
        """The gradients of x, scale and bias."""
        _, _, grads, dx, _ = self.step(x, scale, bias, epsilon, dy, mask)
        return self.outward(dx), *in_order(grads)

    def infer(
        self, x: Any, scale: Any, bias: Any, epsilon: float, mean: Any, var: Any
    ) -> np.ndarray:
        """The layer at evaluation."""
        layer = self.make(x.shape, 0.99, epsilon)
        state = layer.load(layer.state, jnp.asarray(mean), jnp.asarray(var))
        params = put_in_order(layer.params, scale, bias)
        return self.outward(layer.apply(params, state, self.inward(x), False)[0])

    def running(self, batches: Sequence[Any], decay: float, masks: Any = None) -> Arrays:
        """The statistics that the layer evaluates by after training on batches."""
        layer, _, update = self.compiled(batches[0].shape, decay, 1e-5)
        state = layer.state
        for n, x in enumerate(batches):
            mask = () if masks is None else (self.checked(layer, masks[n]),)
            state = update(layer.params, state, self.inward(x), *mask)
        return tuple(map(wide, layer.moments(state)))

    def sharded(
        self,
        x: Any,
        scale: Any,
        bias: Any,
        epsilon: float,
        mask: Any = None,
        groups: Any = None,
    ) -> Arrays:
        """The layer under vmap with a named axis."""
        if not any(p.name == "axes" for p in inspect.signature(self.make).parameters.values()):
            raise NotImplementedError("no named axes")
        axes = {"axis_name": "shards"} | ({"axis_index_groups": groups} if groups else {})
        layer = self.make(x.shape[1:], 0.0, epsilon, **axes)
        params = put_in_order(layer.params, scale, bias)
        inputs = (jnp.asarray(x),) if mask is None else (jnp.asarray(x), jnp.asarray(mask))
        y, state = jax.vmap(
            lambda x, *mask: layer.apply(params, layer.state, x, True, *mask), axis_name="shards"
        )(*inputs)
        return wide(y), *map(wide, layer.moments(state))

    def checked(self, layer: Functional, mask: Any) -> Array:
        """A mask, for layers that take masks."""
        if "mask" not in inspect.signature(layer.apply).parameters:
            raise NotImplementedError("no masks")
        return jnp.asarray(mask)

    def inward(self, x: Any) -> Array:
        """X with its features where the layer wants them."""
        return jnp.moveaxis(jnp.asarray(x), -1, self.axis)

    def outward(self, x: Array) -> np.ndarray:
        """The reverse, in float64."""
        return np.moveaxis(wide(x), self.axis, -1)


class HalfEntry(FunctionalEntry):
    """A layer that rounds all that it is given to bfloat16."""

    def inward(self, x: Any) -> Array:
        """x, if rounding it is no part of what is tried."""
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError("bfloat16 only")
        return super().inward(x)


class OurEntry(FunctionalEntry):
    """bn_jax, which also renormalizes."""

    def renorm(
        self,
        x: Any,
        scale: Any,
        bias: Any,
        epsilon: float,
        mean: Any,
        var: Any,
        r_max: float,
        d_max: float,
    ) -> np.ndarray:
        """bn_jax.batch_renorm."""
        import bn_jax as bn

        params, state = bn.init(x.shape[-1])
        state = state._replace(mean=jnp.asarray(mean), var=jnp.asarray(var), count=state.count + 1)
        params = put_in_order(params, scale, bias)
        y, _ = bn.batch_renorm(
            jnp.asarray(x), params, state, train=True, epsilon=epsilon, r_max=r_max, d_max=d_max
        )
        return wide(y)


class TorchEntry:
    """torch.nn.BatchNorm1d or 2d, on the kind of device JAX uses."""

    unbiased = True

    def prepared(self, x: Any, epsilon: float, decay: float, *values: Any) -> tuple[Any, Any]:
        """A layer with these values of scale, bias, mean and var, and x as a tensor."""
        torch: Any = importlib.import_module("torch")
        layer = torch_layer(x.shape, decay, epsilon)
        names = ("weight", "bias", "running_mean", "running_var")
        with torch.no_grad():
            for name, value in zip(names, values, strict=False):
                getattr(layer, name).copy_(torch.from_numpy(np.array(value, np.float32)))
        return layer, torch_tensor(x, x.dtype.name)

    def batch_norm(self, x: Any, scale: Any, bias: Any, epsilon: float) -> Arrays:
        """The layer in training; the running variance of one batch, made biased."""
        layer, batch = self.prepared(x, epsilon, 0.0, scale, bias)
        y, count = layer(batch), x.size // x.shape[-1]
        mean, var = narrow(layer.running_mean), narrow(layer.running_var)
        return narrow(y), mean, var * (count - 1) / count

    def gradient(self, x: Any, scale: Any, bias: Any, epsilon: float, dy: Any) -> Arrays:
        """The gradients of x, scale and bias."""
        layer, batch = self.prepared(x, epsilon, 0.0, scale, bias)
        layer(batch.requires_grad_()).backward(torch_tensor(dy, dy.dtype.name))
        return tuple(narrow(a.grad) for a in (batch, layer.weight, layer.bias))

    def infer(
        self, x: Any, scale: Any, bias: Any, epsilon: float, mean: Any, var: Any
    ) -> np.ndarray:
        """The layer at evaluation."""
        layer, batch = self.prepared(x, epsilon, 0.0, scale, bias, mean, var)
        return narrow(layer.eval()(batch))

    def running(self, batches: Sequence[Any], decay: float) -> Arrays:
        """The running statistics after training on batches."""
        layer = torch_layer(batches[0].shape, decay)
        for x in batches:
            layer(torch_tensor(x, x.dtype.name))
        return narrow(layer.running_mean), narrow(layer.running_var)


def narrow(tensor: Any) -> np.ndarray:
    """A tensor of torch with features last, in float64."""
    tensor = tensor.detach()
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).double().cpu().numpy()


def in_order(params: Any) -> Arrays:
    """The leaves of params as (scale, bias), told apart by their names if they have some."""
    first, second = (wide(leaf.reshape(-1)) for leaf in jax.tree.leaves(params))
    return (second, first) if bias_is_first(params) else (first, second)


def put_in_order(params: Any, scale: Any, bias: Any) -> Any:
    """Params with other values."""
    leaves, tree = jax.tree.flatten(params)
    values = (bias, scale) if bias_is_first(params) else (scale, bias)
    values = [jnp.asarray(v, a.dtype).reshape(a.shape) for v, a in zip(values, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def bias_is_first(params: Any) -> bool:
    """Whether the first leaf of params is the bias."""
    (path, _), _ = jax.tree_util.tree_leaves_with_path(params)
    name = jax.tree_util.keystr(path)
    return "bias" in name or "offset" in name


def wide(a: Array) -> np.ndarray:
    """Convert to float64."""
    return np.asarray(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a).astype(np.float64)


bn_jax = OurEntry(FUNCTIONAL[OURS], unbiased=True)
flax = FunctionalEntry(FUNCTIONAL["flax"])
flax_accurate = FunctionalEntry(FUNCTIONAL["flax accurate"])
nnx = FunctionalEntry(FUNCTIONAL["nnx"])
nnx_bfloat16 = HalfEntry(functools.partial(peers.nnx, dtype=jnp.bfloat16))
haiku = FunctionalEntry(FUNCTIONAL["haiku"])
equinox = FunctionalEntry(FUNCTIONAL["equinox"], axis=1)
keras = FunctionalEntry(FUNCTIONAL["keras"])
torch = TorchEntry()

ENTRIES: dict[str, Any] = {
    OURS: bn_jax,
    "flax": flax,
    "flax accurate": flax_accurate,
    "nnx": nnx,
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
    "torch": torch,
}
"""The entries by the names of `peers.PEERS`."""
