"""The Sequentials of a model, in which it is known what follows what: each is a chain of layers."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from bn_jax.inference.fold_chain import BATCH_NORMS, LINEAR, Fate, Link, fold_chain

Path = tuple[str, ...]
VALUES = ("kernel", "bias", "scale", "mean", "var")


def identity(x: Any) -> Any:
    """X, where a batch norm was."""
    return x


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
    names = (".".join((*path, "layers", str(n))) for n in range(len(layers)))
    links = [nnx_link(layer, name, uses) for layer, name in zip(layers, names, strict=True)]
    folding = fold_chain(links)
    for n, values in folding.values.items():
        set_values(layers[n], values)
    for n in folding.gone:
        layers[n] = identity
    model.layers = nnx.List(layers)
    return folding.fates


def nnx_link(layer: Any, name: str, uses: Mapping[int, int]) -> Link:
    """A layer and its values, used as often as the most used of them."""
    held = {name: getattr(layer, name, None) for name in VALUES}
    held = {name: v for name, v in held.items() if isinstance(v, nnx.Variable)}
    values = {name: v[...] for name, v in held.items()}
    return Link(name, layer, values, max(uses[id(node)] for node in (layer, *held.values())))


def set_values(layer: Any, values: Mapping[str, Any]) -> None:
    """Give a linear layer its new kernel, and its bias, which it may not have had."""
    layer.kernel[...] = values["kernel"]
    layer.bias = nnx.Param(values["bias"]) if layer.bias is None else layer.bias
    layer.bias[...] = values["bias"]
    layer.use_bias = True
