"""Whole models without their batch norms, for inference: each is folded into a neighbour.

Looked through are flax's Sequentials, in which it is known what follows what; a layer there that
is a Sequential itself is looked through on its own. Of other modules nothing is known but their
parts: give the layers of a list to a Sequential first. What was folded and what was not is in the
report.

A model without its batch norms computes what the model computes at evaluation, by the running
statistics, also if it was set to train. In the place of a batch norm is `identity`, so that all
other layers keep their names. Layers are changed where they stand, also for who reaches into a
Sequential from outside of it. For accuracy see `bn_jax.fold_dense`, for speed
`bn_jax.bench.fold`: folding saves operations, compilation and arrays, and little time under jit on
a CPU, where XLA fuses an unfolded batch norm with its neighbours.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bn_jax.layers.fold_chain import BATCH_NORMS, LINEAR, Fate, Link, Report, fold_chain

Path = tuple[str, ...]
Module = TypeVar("Module", bound=nnx.Module)
VALUES = ("kernel", "bias", "scale", "mean", "var")


def identity(x: Any) -> Any:
    """X, where a batch norm was."""
    return x


def fold_linen(
    module: nn.Sequential, variables: Mapping[str, Any]
) -> tuple[nn.Sequential, dict[str, Any], Report]:
    """A flax.linen Sequential and its variables without batch norms.

    Args:
        module: an nn.Sequential, in which others may be nested.
        variables: `params` and `batch_stats`, as from init or training; not changed.

    Returns:
        The new module; its variables, without those of what was folded; and what became of every
        batch norm.

    Raises:
        TypeError: module is no nn.Sequential.
        ValueError: variables lack one that is needed, or its shape does not fit.

    >>> import jax, jax.numpy as jnp
    >>> from bn_jax.layers.linen import BatchNorm
    >>> norm = BatchNorm(use_running_average=True)
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), use_bias=False), norm, nn.relu, norm.clone()])
    >>> images = jnp.ones((1, 28, 28, 1))
    >>> variables = model.init(jax.random.key(0), images)
    >>> folded, fewer, report = fold_linen(model, variables)
    >>> print(report)
    layers_1 BatchNorm: folded into layers_0 Conv
    layers_3 BatchNorm: stays: follows layers_2 relu, is the last layer
    >>> jax.tree.map(jnp.shape, fewer["params"]["layers_0"])
    {'bias': (8,), 'kernel': (3, 3, 1, 8)}
    >>> y = folded.apply(fewer, images)
    """
    if type(module) is not nn.Sequential:
        raise TypeError(
            f"module is a {type(module).__name__}, in which it is not known what follows what; "
            "give its layers as flax.linen.Sequential"
        )
    flat = flatten_dict(nn.unbox(dict(variables)))
    uses = Counter(id(layer) for layer in linen_layers(module))
    fates: list[Fate] = []
    module = fold_sequential(module, flat, uses, (), fates, {})
    return module, unflatten_dict(flat), Report(fates)


def fold_nnx(model: Module) -> tuple[Module, Report]:
    """A copy of a flax.nnx model, in whose Sequentials there are no batch norms.

    Args:
        model: an nnx.Sequential, or any module that has some; not changed. What is used in
            several places, layers or parameters, is left as it is.

    Returns:
        The copy, and what became of every batch norm. Its Dropouts train as they did before:
        `eval()` is still needed for these.

    Raises:
        TypeError: model is no nnx.Module.
        ValueError: the shape of a parameter or statistic does not fit.

    >>> import jax
    >>> from bn_jax.layers.nnx import BatchNorm
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), BatchNorm(8, rngs=rngs), nnx.relu)
    >>> folded, report = fold_nnx(model)
    >>> print(report)
    layers.1 BatchNorm: folded into layers.0 Linear
    >>> y = folded(jax.numpy.ones((1, 4)))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, but must be an nnx.Module; give layers as "
            "nnx.Sequential(*layers), a linen module and its variables to fold_linen"
        )
    model = nnx.clone(model)
    places = list(nnx_places(model, (), set()))
    uses = Counter(id(node) for _, node in places)
    nodes = {id(node): (path, node) for path, node in reversed(places)}  # by their first places
    fates: list[Fate] = []
    within: set[int] = set()
    for path, node in reversed(nodes.values()):
        if isinstance(node, nnx.Sequential) and type(node).__call__ is nnx.Sequential.__call__:
            within |= set(map(id, node.layers))
            fates += fold_in_place(node, path, uses)
    for path, node in reversed(nodes.values()):
        if type(node) in BATCH_NORMS and id(node) not in within:
            name = str(Link(".".join(path), node, {}))
            fates.append(Fate(name, None, "is in no Sequential: what it follows is not known"))
    return model, Report(fates)


# linen: layers are descriptions, and their values are found by their paths.


def linen_layers(module: nn.Sequential) -> Iterator[Any]:
    """All layers, as often as they are used; those of a nested Sequential once."""
    layers: list[Any] = list(module.layers)
    nested = {id(layer): layer for layer in layers if type(layer) is nn.Sequential}
    yield from layers
    for layer in nested.values():
        yield from linen_layers(layer)


def fold_sequential(
    module: nn.Sequential,
    flat: dict[Path, Any],
    uses: Mapping[int, int],
    path: Path,
    fates: list[Fate],
    done: dict[int, nn.Sequential],
) -> nn.Sequential:
    """The Sequential at a path, without batch norms; changes flat, and appends to fates.

    One that is used twice is folded once, and stays one: `done` has them by their ids.
    """
    layers: list[Any] = list(module.layers)
    paths = [(*path, f"layers_{n}") for n in range(len(layers))]
    links = []
    for where, layer in zip(paths, layers, strict=True):
        used = uses[id(layer)]
        values = linen_values(layer, flat, where) if used == 1 else {}
        links.append(Link("/".join(where), layer, values, used))
    folding = fold_chain(links)
    fates += folding.fates
    for n, values in folding.values.items():
        layers[n] = layers[n].clone(use_bias=True)
        flat.update({("params", *paths[n], name): value for name, value in values.items()})
    for n in folding.gone:
        layers[n] = identity
        for collection in ("params", "batch_stats"):
            for name in VALUES:
                flat.pop((collection, *paths[n], name), None)
    for n, layer in enumerate(layers):
        if type(layer) is nn.Sequential:
            if id(layer) not in done:
                done[id(layer)] = fold_sequential(layer, flat, uses, paths[n], fates, done)
            layers[n] = done[id(layer)]
    return module.clone(layers=layers)


def linen_values(layer: Any, flat: Mapping[Path, Any], path: Path) -> dict[str, Any]:
    """What a layer that matters here has for variables."""
    names = {"kernel": "params"} if type(layer) in LINEAR else {}
    if type(layer) in BATCH_NORMS:
        names = {"mean": "batch_stats", "var": "batch_stats"}
        names |= {"scale": "params"} if layer.use_scale else {}
    names |= {"bias": "params"} if names and layer.use_bias else {}
    values = {}
    for name, collection in names.items():
        if (collection, *path, name) not in flat:
            raise ValueError(
                f"variables lack {'/'.join((collection, *path, name))}; give params and "
                "batch_stats of this module, as its init makes them"
            )
        values[name] = flat[collection, *path, name]
    return values


# nnx: layers hold their values.


def nnx_places(node: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, Any]]:
    """Every module and variable with its path, as often as it is found."""
    if isinstance(node, nnx.Pytree | nnx.Variable):
        yield path, node
    if id(node) in seen or isinstance(node, nnx.Variable):
        return
    children: dict[Any, Any] = {}
    if isinstance(node, nnx.Pytree):
        own = vars(node).items()  # of a list in flax 0.12.2, by numbers
        children = {name: child for name, child in own if str(name)[:8] != "_pytree_"}
    elif isinstance(node, Mapping):
        children = dict(node)
    elif isinstance(node, list | tuple):
        children = dict(enumerate(node))
    if children:
        seen.add(id(node))
    for name, child in children.items():
        yield from nnx_places(child, (*path, str(name)), seen)


def fold_in_place(model: nnx.Sequential, path: Path, uses: Mapping[int, int]) -> list[Fate]:
    """Take the batch norms out of one Sequential, found at a path."""
    layers: list[Any] = list(model.layers)
    links = []
    for n, layer in enumerate(layers):
        held = {name: getattr(layer, name, None) for name in VALUES}
        held = {name: v for name, v in held.items() if isinstance(v, nnx.Variable)}
        values = {name: v[...] for name, v in held.items()}
        used = max(uses[id(node)] for node in (layer, *held.values()))
        links.append(Link(".".join((*path, "layers", str(n))), layer, values, used))
    folding = fold_chain(links)
    for n, values in folding.values.items():
        layers[n].kernel[...] = values["kernel"]
        layers[n].bias = nnx.Param(values["bias"]) if layers[n].bias is None else layers[n].bias
        layers[n].bias[...] = values["bias"]
        layers[n].use_bias = True
    for n in folding.gone:
        layers[n] = identity
    model.layers = nnx.List(layers)
    return folding.fates
