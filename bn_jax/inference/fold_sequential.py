"""Folds the Sequentials of a model: each is a chain of layers, whose order is known."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from bn_jax.inference.fold_chain import BATCH_NORMS, LINEAR, ChainLayer, FoldResult, fold_chain

Path = tuple[str, ...]
VALUES = ("kernel", "bias", "scale", "mean", "var")


def identity(x: Any) -> Any:
    """Return x; stands in place of a folded batch norm."""
    return x


# linen: layers hold no values; these are found in the variables by path.


def linen_layers(module: nn.Sequential) -> Iterator[Any]:
    """All layers, as often as they are used; the layers of a nested Sequential once."""
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
    results: list[FoldResult],
    done: dict[int, nn.Sequential],
) -> nn.Sequential:
    """The Sequential at a path, without batch norms; changes flat, and appends to results.

    A Sequential that is used twice is folded once and remains one object: `done` holds the folded
    ones by the ids of the originals.
    """
    layers: list[Any] = list(module.layers)
    paths = [(*path, f"layers_{n}") for n in range(len(layers))]
    chain = []
    for where, layer in zip(paths, layers, strict=True):
        used = uses[id(layer)]
        values = linen_values(layer, flat, where) if used == 1 else {}
        chain.append(ChainLayer("/".join(where), layer, values, used))
    folding = fold_chain(chain)
    results += folding.results
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
                done[id(layer)] = fold_sequential(layer, flat, uses, paths[n], results, done)
            layers[n] = done[id(layer)]
    return module.clone(layers=layers)


def linen_values(layer: Any, flat: Mapping[Path, Any], path: Path) -> dict[str, Any]:
    """The variables of a linear layer or batch norm; none for other layers."""
    names = {"kernel": "params"} if type(layer) in LINEAR else {}
    if type(layer) in BATCH_NORMS:
        names = {"mean": "batch_stats", "var": "batch_stats"}
        names |= {"scale": "params"} if layer.use_scale else {}
    names |= {"bias": "params"} if names and layer.use_bias else {}
    values = {}
    for name, collection in names.items():
        if (collection, *path, name) not in flat:
            raise ValueError(
                f"variables lack {'/'.join((collection, *path, name))}; pass params and "
                "batch_stats of this module, as its init returns them"
            )
        values[name] = flat[collection, *path, name]
    return values


# nnx: layers hold their values.


def nnx_places(node: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, Any]]:
    """Every module and variable with its path; one that is used twice is found twice."""
    if isinstance(node, nnx.Pytree | nnx.Variable):
        yield path, node
    if id(node) in seen or isinstance(node, nnx.Variable):
        return
    children: dict[Any, Any] = {}
    if isinstance(node, nnx.Pytree):
        own = vars(node).items()  # nnx.List of flax 0.12.2 has numbers as names
        children = {name: child for name, child in own if str(name)[:8] != "_pytree_"}
    elif isinstance(node, Mapping):
        children = dict(node)
    elif isinstance(node, list | tuple):
        children = dict(enumerate(node))
    if children:
        seen.add(id(node))
    for name, child in children.items():
        yield from nnx_places(child, (*path, str(name)), seen)


def fold_in_place(model: nnx.Sequential, path: Path, uses: Mapping[int, int]) -> list[FoldResult]:
    """Fold the batch norms of the Sequential at a path, in place."""
    layers: list[Any] = list(model.layers)
    names = (".".join((*path, "layers", str(n))) for n in range(len(layers)))
    chain = [nnx_layer(layer, name, uses) for layer, name in zip(layers, names, strict=True)]
    folding = fold_chain(chain)
    for n, values in folding.values.items():
        set_values(layers[n], values)
    for n in folding.gone:
        layers[n] = identity
    model.layers = nnx.List(layers)
    return folding.results


def nnx_layer(layer: Any, name: str, uses: Mapping[int, int]) -> ChainLayer:
    """A layer with its values; a layer is used as often as its most used parameter."""
    held = {name: getattr(layer, name, None) for name in VALUES}
    held = {name: v for name, v in held.items() if isinstance(v, nnx.Variable)}
    values = {name: v[...] for name, v in held.items()}
    return ChainLayer(name, layer, values, max(uses[id(node)] for node in (layer, *held.values())))


def set_values(layer: Any, values: Mapping[str, Any]) -> None:
    """Set the kernel and the bias of a linear layer, which may not have had a bias."""
    layer.kernel[...] = values["kernel"]
    layer.bias = nnx.Param(values["bias"]) if layer.bias is None else layer.bias
    layer.bias[...] = values["bias"]
    layer.use_bias = True
