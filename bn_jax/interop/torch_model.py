"""Converts the state_dict of a whole torch model to the variables of a flax.linen model.

Three kinds of layers are recognized by their entries:

- a batch norm has `running_mean`;
- a linear map has a weight with two axes: [out, in] in torch, [in, out] in flax;
- a convolution, grouped or not, has a weight with three or more axes: [out, in, height, width] in
  torch, [height, width, in, out] in flax.

Three differences cannot be seen from the arrays, so you have to take care of them. For a 3×3
convolution of stride 2, torch's `padding=1` pads both sides, but flax's "SAME" pads one: write
padding=((1, 1), (1, 1)). A transposed convolution looks like a convolution: convert it by hand. A
linear layer after a flattening gets its inputs in another order: use `flattened`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.interop.checks import (
    checkpoint_error,
    read_mapping,
    read_statistic,
    refuse_extra,
    require,
    some,
)
from bn_jax.interop.files import read_file
from bn_jax.interop.flax import keys_of, nest, variables_of
from bn_jax.interop.settings import Settings, read_epsilon
from bn_jax.interop.torch import REMEDY, average_of, from_torch, join
from bn_jax.interop.values import read_ours


def from_torch_model(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    names: Mapping[str, str],
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    flattened: Mapping[str, Sequence[int]] | None = None,
    count: bool = True,
    like: Any = None,
) -> tuple[dict[str, Any], Settings]:
    """Convert a torch model to the variables of a linen model.

    Args:
        state_dict: of the whole model, tensors or arrays; or the path of a safetensors file.
        names: torch's name of each layer -> its name in the linen model, e.g.
            {"conv1": "Conv_0", "bn1": "BatchNorm_0"}. Every layer of the state_dict must be named.
        momentum: of the batch norms' constructors. None is a plain mean over all batches.
        eps: of the batch norms' constructors.
        flattened: torch's name of a linear layer -> (channels, height, width) of the feature maps
            that are flattened before it. torch flattens channels first and flax channels last, so
            the weight's inputs are reordered.
        count: write `count` into batch_stats, for our layers with an `average`. flax's own layers
            have no such variable.
        like: variables to compare structure and shapes with, e.g. the result of
            `jax.eval_shape(model.init, ...)`.

    Returns:
        (variables, settings): {"params": ..., "batch_stats": ...}, and the arguments of the model's
        batch norms, `bn_jax.layers.linen.BatchNorm(**settings)`.

    Raises:
        CheckpointError: an entry is missing, unknown, named twice, of the wrong shape, not finite,
            or not an array; a variance is negative; the file is not a safetensors file; structure
            or shapes differ from those of `like`.

    >>> import numpy as np
    >>> state_dict = {"conv.weight": np.ones((8, 3, 5, 5)), "bn.running_mean": np.zeros(8),
    ...     "bn.running_var": np.ones(8)}
    >>> variables, settings = from_torch_model(
    ...     state_dict, {"conv": "Conv_0", "bn": "BatchNorm_0"}, count=False)
    >>> jax.tree.map(jnp.shape, variables["params"])
    {'Conv_0': {'kernel': (5, 5, 3, 8)}}
    >>> jax.tree.map(jnp.shape, variables["batch_stats"])
    {'BatchNorm_0': {'mean': (8,), 'var': (8,)}}
    """
    if isinstance(state_dict, str | os.PathLike):
        state_dict = read_file(state_dict)
    state_dict = read_mapping("state_dict", state_dict, REMEDY)
    flattened = {} if flattened is None else flattened
    check_names(state_dict, names, flattened)
    settings = Settings(average=average_of(momentum), epsilon=read_epsilon(eps), unbiased=True)
    variables: dict[str, Any] = {"params": {}}
    for theirs, ours in names.items():
        layer = {key: state_dict[key] for key in state_dict if key.startswith(join(theirs, ""))}
        if join(theirs, "running_mean") in layer:
            params, state, _ = from_torch(layer, theirs, momentum=momentum, eps=eps)
            part = variables_of(read_ours(params, state), ours, count=count)
        else:
            part = {"params": nest(keys_of(ours), linear(layer, theirs, flattened.get(theirs)))}
        variables = merge(variables, part)
    if like is not None:
        check_like(variables, like, count)
    return variables, settings


def linear(
    layer: Mapping[str, Any], name: str, flattened: Sequence[int] | None = None
) -> dict[str, Any]:
    """Kernel and bias of a linear layer or a convolution, in flax's order of axes.

    Args:
        layer: weight, and bias if there is one, by their full names.
        name: the layer's name.
        flattened: (channels, *locations) of the feature maps that are flattened before the layer.

    Raises:
        CheckpointError: an entry is missing, unknown, of the wrong shape, or not an array of finite
            floats.

    >>> linear({"fc.weight": np.ones((3, 2)), "fc.bias": np.ones(3)}, "fc")["kernel"].shape
    (2, 3)
    """
    key, bias_key = join(name, "weight"), join(name, "bias")
    refuse_extra(
        layer,
        (key, bias_key),
        f"{name} was taken for a linear layer or convolution: convert it by hand",
    )
    weight = read_statistic(key, require(layer, key, f"{name} has no such entry: check the names"))
    if weight.ndim < 2:
        raise checkpoint_error(
            key,
            f"has shape {weight.shape}",
            "a linear layer has two axes, a convolution three or more: convert others by hand",
        )
    if flattened is not None:
        if weight.ndim != 2 or int(np.prod(flattened)) != weight.shape[1]:
            raise checkpoint_error(
                key,
                f"has shape {weight.shape}",
                f"flattened={tuple(flattened)} must be the (channels, *locations) of a linear "
                "layer's inputs, and their product the number of inputs",
            )
        channels_last = weight.reshape(len(weight), *flattened)
        weight = np.moveaxis(channels_last, 1, -1).reshape(weight.shape)
    kernel = np.moveaxis(weight, (0, 1), (-1, -2))
    parts = {"kernel": jnp.asarray(kernel)}
    if bias_key in layer:
        bias = read_statistic(bias_key, layer[bias_key])
        if bias.shape != weight.shape[:1]:
            raise checkpoint_error(
                bias_key,
                f"has shape {bias.shape}, but {key} {weight.shape}",
                "a bias has one value per output: check that both belong to the same layer",
            )
        parts["bias"] = jnp.asarray(bias)
    return parts


def check_names(
    state_dict: Mapping[str, Any], names: Mapping[str, str], flattened: Mapping[str, Any]
) -> None:
    """Check that every layer has a name in the linen model, and that no name is used twice.

    Raises:
        CheckpointError: a layer is not named, a name has no layer, or two layers share a name.

    >>> check_names({"fc.weight": 0}, {"fc": "Dense_0"}, {})
    """
    prefixes = {key.rpartition(".")[0] for key in map(str, state_dict)}
    for key in map(str, state_dict):
        if key.rpartition(".")[0] not in names:
            raise checkpoint_error(
                key,
                "is not named",
                "add its layer to names, or leave it out of the state_dict",
            )
    for name in (*names, *flattened):
        if name not in prefixes or name not in names:
            raise checkpoint_error(
                name,
                f"is missing among {some(sorted(prefixes))}",
                "the keys of names and flattened are torch's names of layers",
            )
    places = list(names.values())
    twice = {place for place in places if places.count(place) > 1}
    if twice:
        raise checkpoint_error(
            some(twice), "is the name of several layers", "give each its own path in names"
        )


def check_like(variables: Any, like: Any, count: bool) -> None:
    """Refuse variables that do not fit the linen model.

    Raises:
        CheckpointError: paths or shapes differ.

    >>> check_like({"params": {"a": jnp.ones(2)}}, {"params": {"a": jnp.ones(2)}}, False)
    """
    ours, theirs = shapes(variables), shapes(like)
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    if missing:
        raise checkpoint_error(some(missing), "has no value", "add torch's name of it to names")
    if extra:
        hint = ", or count=False" if count and all(e.endswith("/count") for e in extra) else ""
        raise checkpoint_error(some(extra), "has no place in the model", f"check names{hint}")
    for path, shape in ours.items():
        if shape != theirs[path]:
            raise checkpoint_error(
                path,
                f"has shape {shape}, but the model's {theirs[path]}",
                "make the model with the same sizes, and check names",
            )


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape, for all arrays in a tree.

    >>> shapes({"a": {"b": np.ones(2)}})
    {'a/b': (2,)}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(part.key) for part in path): tuple(leaf.shape) for path, leaf in leaves}


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two trees that may share branches but no leaves.

    >>> merge({"a": {"b": 1}}, {"a": {"c": 2}})
    {'a': {'b': 1, 'c': 2}}
    """
    return {
        key: merge(a[key], b[key]) if key in a and key in b else (a if key in a else b)[key]
        for key in (*a, *(key for key in b if key not in a))
    }
