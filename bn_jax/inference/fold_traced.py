"""Any model without batch norms, given an example of its input: linen's and nnx's way to it.

Of linen, where layers exist only while a model is called, calls are intercepted: of a folded model
too, whose code still calls its batch norms. Of nnx, layers are changed where they stand.
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

from bn_jax.inference.fold_chain import BATCH_NORMS, LINEAR, Link, Report
from bn_jax.inference.fold_dataflow import Follows, fold_followers, mark_call, trace
from bn_jax.inference.fold_sequential import linen_values, nnx_link, nnx_places, set_values
from bn_jax.layers.graph_mode import graph_mode

Path = tuple[str, ...]
FOLDABLE = (*LINEAR, *BATCH_NORMS)


@dataclasses.dataclass(frozen=True)
class Folded:
    """A linen model whose batch norms were folded. It is applied as a module is.

    Attributes:
        module: the model; the names of its variables stay.
        gone: paths of batch norms, which return what they get.
        biased: paths of layers without bias, which now have one.
    """

    module: nn.Module
    gone: frozenset[Path]
    biased: frozenset[Path]

    def apply(self, variables: Mapping[str, Any], *inputs: Any, **options: Any) -> Any:
        """What `module.apply` computes at evaluation; takes the same, given folded variables."""
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
    """A method's call in a folded model."""
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
) -> tuple[Folded, dict[str, Any], Report]:
    """The folded model, its variables and the report; changes flat."""
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

    follows = trace(run, dict(variables), inputs, options)
    links = {}
    for name, layer in found.items():
        values = linen_values(layer, flat, layer.path)
        # Of a layer inside of scan or vmap, the variables have those of all its copies.
        copies = sum(jnp.size(value) for value in values.values()) // sizes[name]
        links[name] = Link(name, layer, values, follows.uses[name] * copies)
    values, gone, report = fold_followers(links, follows)
    for name, new in values.items():
        flat.update({("params", *found[name].path, key): value for key, value in new.items()})
    for name in gone:
        for key in [key for key in flat if key[1:-1] == found[name].path]:
            del flat[key]
    biased = frozenset(found[name].path for name in values if not found[name].use_bias)
    paths = frozenset(found[name].path for name in gone)
    return Folded(module, paths, biased), unflatten_dict(flat), report


class Identity(nnx.Module):
    """What is left of an nnx batch norm that was folded: it returns what it gets."""

    def __call__(self, x: Any, *rest: Any, **options: Any) -> Any:
        """X."""
        return x


def fold_traced_nnx(
    model: nnx.Module, uses: Counter[int], inputs: tuple[Any, ...], options: dict[str, Any]
) -> Report:
    """Fold the batch norms of a model where they stand.

    Args:
        model: is changed.
        uses: in how many places of the model each layer and variable is, by id.
        inputs: of its call.
        options: likewise.
    """
    layers = {}
    for path, node in reversed(list(nnx_places(model, (), set()))):  # by their first places
        if type(node) in FOLDABLE:
            layers[id(node)] = (".".join(path), node)
    layers = dict(reversed(layers.values()))
    follows = trace_nnx(model, inputs, options)
    links = {}
    for name, layer in layers.items():
        link = nnx_link(layer, name, uses)
        links[name] = link._replace(uses=max(link.uses, follows.uses[name]))
    values, gone, report = fold_followers(links, follows)
    for name, new in values.items():
        set_values(layers[name], new)
    for name in gone:
        norm = layers[name]
        for attribute in [a for a in vars(norm) if not a.startswith("_pytree_")]:
            delattr(norm, attribute)
        norm.__class__ = Identity
    return report


def trace_nnx(model: nnx.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Follows:
    """What follows what in a call of the model, as at evaluation."""
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
    """Refuse a batch norm that is called to train, which no other layer can do for it.

    Raises:
        ValueError: it is.
    """
    if (kind or type(layer)) not in BATCH_NORMS:
        return
    evaluate = options.get("use_running_average", inputs[1] if len(inputs) > 1 else None)
    evaluate = layer.use_running_average if evaluate is None else evaluate
    if not evaluate:
        raise ValueError(
            f"{name} is called to train, by the batch's own statistics; give what the model takes "
            "at evaluation, e.g. fold_linen(module, variables, x, train=False)"
        )


@functools.cache
def marking(kind: type) -> type:
    """A class of layers that mark what they get and return."""

    def call(self: Any, *inputs: Any, **options: Any) -> Any:
        check_evaluates(self.fold_name, self, inputs, options, kind)
        return mark_call(self.fold_name, functools.partial(kind.__call__, self), inputs, options)

    return type(kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__})
