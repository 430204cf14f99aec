"""Folds models that are not Sequentials, given an example of their input.

A linen model makes its layers while it is called. So their calls are intercepted: once to trace the
model, and whenever the folded model is applied, because its code still calls the batch norms. An
nnx model holds its layers, and they are changed in place.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bn_jax.inference.fold_chain import BATCH_NORMS, LINEAR, ChainLayer, FoldReport
from bn_jax.inference.fold_dataflow import Dataflow, fold_followers, mark_call, trace
from bn_jax.inference.fold_sequential import linen_values, nnx_layer, nnx_places, set_values
from bn_jax.layers.graph_mode import graph_mode

Path = tuple[str, ...]
FOLDABLE = (*LINEAR, *BATCH_NORMS)


@dataclasses.dataclass(frozen=True)
class FoldedModule:
    """A linen model whose batch norms were folded. It is applied as a module is.

    Attributes:
        module: the original model; its variables keep their names.
        gone: paths of the folded batch norms, which return their input.
        biased: paths of the linear layers that gained a bias.

    >>> net = nn.Sequential([nn.Dense(2, use_bias=False), nn.BatchNorm(True)])
    >>> folded = FoldedModule(net, frozenset({("layers_1",)}), frozenset({("layers_0",)}))
    >>> dense = {"kernel": jnp.eye(2), "bias": jnp.array([1.0, 2.0])}
    >>> folded.apply({"params": {"layers_0": dense}}, jnp.zeros((1, 2))).tolist()
    [[1.0, 2.0]]
    """

    module: nn.Module
    gone: frozenset[Path]
    biased: frozenset[Path]

    def apply(self, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Any:
        """Apply the folded model; takes what `module.apply` takes in evaluation."""
        with nn.intercept_methods(functools.partial(call_folded, self.gone, self.biased)):
            return self.module.apply(variables, *inputs, **options)


def call_folded(
    gone: frozenset[Path],
    biased: frozenset[Path],
    call: Any,
    inputs: Any,
    options: Any,
    context: Any,
) -> Any:
    """Intercept a call in a folded model: skip folded batch norms, and add new biases."""
    layer = context.module
    if context.method_name != "__call__" or type(layer) not in FOLDABLE:
        return call(*inputs, **options)
    if layer.path in gone:
        return inputs[0]
    y = call(*inputs, **options)
    if layer.path not in biased:
        return y
    bias = jnp.asarray(layer.get_variable("params", "bias"), y.dtype)
    return y + bias.reshape([1] * (y.ndim - 1) + [-1])


def fold_traced_linen(
    module: nn.Module,
    flat: dict[Path, Any],
    variables: Mapping[str, Any],
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[FoldedModule, dict[str, Any], FoldReport]:
    """The folded model, its variables and the report; changes `flat`."""
    found: dict[str, Any] = {}
    sizes: dict[str, int] = {}

    def intercept(call: Any, inputs: Any, options: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__" or type(layer) not in FOLDABLE:
            return call(*inputs, **options)
        name = "/".join(layer.path)
        check_evaluates(name, layer, inputs, options)
        y = mark_call(name, call, inputs, options)
        found[name] = layer
        own = linen_values(layer, flatten_dict(nn.unbox(dict(layer.variables))), ())
        sizes[name] = sum(value.size for value in own.values())
        return y

    def run(variables: Any, inputs: Any, options: Any) -> Any:
        with nn.intercept_methods(intercept):
            return module.apply(variables, *inputs, **options)

    dataflow = trace(run, dict(variables), inputs, options)
    chain_layers = {}
    for name, layer in found.items():
        values = linen_values(layer, flat, layer.path)
        # The variables of a layer inside scan or vmap hold those of all its copies.
        copies = sum(jnp.size(value) for value in values.values()) // sizes[name]
        chain_layers[name] = ChainLayer(name, layer, values, dataflow.uses[name] * copies)
    values, gone, report = fold_followers(chain_layers, dataflow)
    for name, new in values.items():
        flat.update({("params", *found[name].path, key): value for key, value in new.items()})
    for name in gone:
        for key in [key for key in flat if key[1:-1] == found[name].path]:
            del flat[key]
    biased = frozenset(found[name].path for name in values if not found[name].use_bias)
    paths = frozenset(found[name].path for name in gone)
    return FoldedModule(module, paths, biased), unflatten_dict(flat), report


class Identity(nnx.Module):
    """Stands in place of a folded nnx batch norm, and returns its input."""

    def __call__(self, x: Any, *rest: Any, **options: Any) -> Any:
        """Return x."""
        return x


def fold_traced_nnx(
    model: nnx.Module, uses: Counter[int], inputs: tuple[Any, ...], options: dict[str, Any]
) -> FoldReport:
    """Fold the batch norms of a model in place.

    Args:
        model: to be changed.
        uses: in how many places of the model each layer and variable is used, by id.
        inputs: an example of the model's arguments.
        options: its keyword arguments.
    """
    layers = {}
    for path, node in reversed(list(nnx_places(model, (), set()))):  # first place of each
        if type(node) in FOLDABLE:
            layers[id(node)] = (".".join(path), node)
    layers = dict(reversed(layers.values()))
    dataflow = trace_nnx(model, inputs, options)
    chain_layers = {}
    for name, layer in layers.items():
        found = nnx_layer(layer, name, uses)
        chain_layers[name] = found._replace(uses=max(found.uses, dataflow.uses[name]))
    values, gone, report = fold_followers(chain_layers, dataflow)
    for name, new in values.items():
        set_values(layers[name], new)
    for name in gone:
        norm = layers[name]
        for attribute in [a for a in vars(norm) if not a.startswith("_pytree_")]:
            delattr(norm, attribute)
        norm.__class__ = Identity
    return report


def trace_nnx(model: nnx.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Dataflow:
    """The dataflow between the layers of a model when it is called in evaluation."""
    with graph_mode():
        marked = nnx.clone(model)
        marked.eval()
    seen: set[int] = set()
    for path, node in list(nnx_places(marked, (), set())):
        if type(node) in FOLDABLE and id(node) not in seen:
            seen.add(id(node))
            node.fold_name = ".".join(path)
            node.__class__ = marking(type(node))
    with graph_mode():
        graph, state = nnx.split(marked)

    def run(state: Any, inputs: Any, options: Any) -> Any:
        with graph_mode():
            model = nnx.merge(graph, state)
        return model(*inputs, **options)

    return trace(run, state, inputs, options)


def check_evaluates(
    name: str, layer: Any, inputs: Any, options: Mapping[str, Any], kind: type | None = None
) -> None:
    """Refuse a batch norm in training mode: no other layer can use the batch's statistics.

    Raises:
        ValueError: the call trains.
    """
    if (kind or type(layer)) not in BATCH_NORMS:
        return
    evaluate = options.get("use_running_average", inputs[1] if len(inputs) > 1 else None)
    evaluate = layer.use_running_average if evaluate is None else evaluate
    if not evaluate:
        raise ValueError(
            f"{name} is called in training mode, by the batch's statistics; pass what the model "
            "takes in evaluation, e.g. fold_linen(module, variables, x, train=False)"
        )


@functools.cache
def marking(kind: type) -> type:
    """A subclass of a layer class whose calls are marked."""

    def call(self: Any, *inputs: Any, **options: Any) -> Any:
        check_evaluates(self.fold_name, self, inputs, options, kind)
        return mark_call(self.fold_name, functools.partial(kind.__call__, self), inputs, options)

    return type(kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__})
