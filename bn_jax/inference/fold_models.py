"""Whole models without their batch norms, for inference: each is folded into a neighbour.

Which layer follows which is known in flax's Sequentials, and of any other model once it is called:
give an example of its input, or shapes and dtypes of one, and the model is traced on it.

    module, variables, report = fold_linen(module, variables, images, train=False)
    model, report = fold_nnx(model, images)

A model without its batch norms computes what the model computes at evaluation, by the running
statistics, also if it was set to train. What was folded and what was not, and why, is in the
report. For accuracy see `bn_jax.fold_dense`, for speed `bn_jax.bench.fold`: folding saves
operations, compilation and arrays, and little time under jit on a CPU, where XLA fuses an unfolded
batch norm with its neighbours.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bn_jax.inference.fold_chain import BATCH_NORMS, Fate, Link, Report
from bn_jax.inference.fold_sequential import (
    fold_in_place,
    fold_sequential,
    identity,
    linen_layers,
    nnx_places,
)
from bn_jax.inference.fold_traced import Folded, fold_traced_linen, fold_traced_nnx
from bn_jax.layers.graph_mode import graph_mode

__all__ = ["fold_linen", "fold_nnx", "identity"]

Module = TypeVar("Module", bound=nnx.Module)


def fold_linen(
    module: nn.Module, variables: Mapping[str, Any], *inputs: Any, **options: Any
) -> tuple[nn.Sequential | Folded, dict[str, Any], Report]:
    """A flax.linen model and its variables without batch norms.

    Args:
        module: any module if inputs are given; else an nn.Sequential, in which others may be
            nested, and whose layers keep their names: `identity` is where a batch norm was.
        variables: `params` and `batch_stats`, as from init or training; not changed.
        *inputs: what `module.apply(variables, *inputs, **options)` takes at evaluation: arrays, or
            shapes and dtypes.
        **options: likewise, e.g. train=False.

    Returns:
        A Sequential without inputs, else a `Folded`, whose apply takes what the module's does; its
        variables, without those of what was folded; and what became of every batch norm.

    Raises:
        TypeError: module is no nn.Sequential, and there are no inputs.
        ValueError: variables lack one that is needed, or its shape does not fit; with these inputs,
            a batch norm trains.

    >>> import jax, jax.numpy as jnp
    >>> from bn_jax.layers.linen import BatchNorm
    >>> class Block(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         y = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
    ...         y = BatchNorm(use_running_average=not train)(y)
    ...         return nn.relu(x + y)
    >>> images = jnp.ones((1, 28, 28, 8))
    >>> variables = Block().init(jax.random.key(0), images, train=False)
    >>> folded, fewer, report = fold_linen(Block(), variables, images, train=False)
    >>> print(report)
    BatchNorm_0 BatchNorm: folded into Conv_0 Conv
    >>> jax.tree.map(jnp.shape, fewer)
    {'params': {'Conv_0': {'bias': (8,), 'kernel': (3, 3, 8, 8)}}}
    >>> y = folded.apply(fewer, images, train=False)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is a {type(module).__name__}, but must be a flax.linen.Module; give an "
            "nnx.Module to fold_nnx"
        )
    flat = flatten_dict(nn.unbox(dict(variables)))
    if inputs:
        return fold_traced_linen(module, flat, variables, inputs, options)
    if type(module) is not nn.Sequential:
        raise TypeError(
            f"module is a {type(module).__name__}, in which it is not known what follows what; "
            "give an example of its input too, fold_linen(module, variables, x), or its layers as "
            "flax.linen.Sequential"
        )
    uses = Counter(id(layer) for layer in linen_layers(module))
    fates: list[Fate] = []
    module = fold_sequential(module, flat, uses, (), fates, {})
    return module, unflatten_dict(flat), Report(fates)


def fold_nnx(model: Module, *inputs: Any, **options: Any) -> tuple[Module, Report]:
    """A copy of a flax.nnx model without batch norms.

    Args:
        model: any module if inputs are given; else an nnx.Sequential, or a module that has some,
            in which `identity` is where a batch norm was. Not changed. What is used in several
            places, layers or parameters, is left as it is.
        *inputs: what the model takes at evaluation, `model(*inputs, **options)`: arrays, or shapes
            and dtypes.
        **options: likewise.

    Returns:
        The copy, and what became of every batch norm. Its Dropouts train as they did before:
        `eval()` is still needed for these.

    Raises:
        TypeError: model is no nnx.Module.
        ValueError: the shape of a parameter or statistic does not fit; a batch norm is told to
            train by its call.

    >>> import jax
    >>> from bn_jax.layers.nnx import BatchNorm
    >>> class Block(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.conv = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
    ...         self.norm = BatchNorm(8, rngs=rngs)
    ...     def __call__(self, x):
    ...         return nnx.relu(x + self.norm(self.conv(x)))
    >>> images = jax.numpy.ones((1, 28, 28, 8))
    >>> folded, report = fold_nnx(Block(nnx.Rngs(0)), images)
    >>> print(report)
    norm BatchNorm: folded into conv Conv
    >>> y = folded(images)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, but must be an nnx.Module; give layers as "
            "nnx.Sequential(*layers), a linen module and its variables to fold_linen"
        )
    with graph_mode():
        model = nnx.clone(model)
    places = list(nnx_places(model, (), set()))
    uses = Counter(id(node) for _, node in places)
    if inputs:
        return model, fold_traced_nnx(model, uses, inputs, options)
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
            fates.append(Fate(name, None, NOT_KNOWN))
    return model, Report(fates)


NOT_KNOWN = "is in no Sequential: what it follows is known from a call: fold_nnx(model, x)"
