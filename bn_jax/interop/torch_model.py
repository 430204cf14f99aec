"""A whole torch model: its state_dict as variables of a flax.linen model, by a map of names.

Three kinds of layers are told apart by their entries: a batch norm has `running_mean`; a weight of
two axes is a linear map's, [out, in] there and [in, out] here; of three axes and more a
convolution's, [out, in, height, width] there and [height, width, in, out] here (grouped ones too).

Differs from flax in what no array tells, so the model has to: torch pads a 3×3 convolution of
stride 2 by `padding=1` on both sides, flax's "SAME" on one, so write padding=((1, 1), (1, 1));
a transposed convolution's weight cannot be told from a convolution's, and has to be converted by
hand; and a linear map after a flattening sees its inputs in another order, see `flattened`.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.interop.checks import (
    read_mapping,
    read_statistic,
    refusal,
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
    """The variables of a linen model, and the settings of its batch norms.

    Args:
        state_dict: of the whole model, tensors or arrays; or the path of a safetensors file.
        names: torch's name of a layer -> ours, e.g. {"conv1": "Conv_0", "bn1": "BatchNorm_0"}. All
            of the state_dict must be named, once.
        momentum: of all batch norms, as they were made; None averages all batches alike.
        eps: likewise.
        flattened: torch's name of a linear map -> (channels, height, width) of the feature maps
            that are flattened before it: torch's are channels first, flax's channels last, and the
            weight's inputs are put in flax's order.
        count: write `count` into batch_stats, which our layers with an average keep; flax's own
            have none.
        like: variables of the same structure and shapes, to compare with, e.g. of
            `jax.eval_shape(model.init, ...)`.

    Returns:
        (variables, settings): {"params": ..., "batch_stats": ...}; the model's batch norms are
        `bn_jax.layers.linen.BatchNorm(**settings)`.

    Raises:
        CheckpointError: an entry is missing, extra, named twice, wrongly shaped, not finite, or no
            array; a variance is negative; the file is no safetensors file; structure or shapes
            differ from like's.

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
    """A linear map's or a convolution's kernel and bias, in flax's order of axes.

    Args:
        layer: weight, and if there is one bias, by their full names.
        name: the layer's.
        flattened: (channels, *locations) of what is flattened before a linear map.

    Raises:
        CheckpointError: an entry is missing, extra, wrongly shaped, or no array of finite floats.

    >>> linear({"fc.weight": np.ones((3, 2)), "fc.bias": np.ones(3)}, "fc")["kernel"].shape
    (2, 3)
    """
    key, bias_key = join(name, "weight"), join(name, "bias")
    refuse_extra(
        layer, (key, bias_key), f"{name} is read as a linear map or convolution: convert it by hand"
    )
    weight = read_statistic(key, require(layer, key, f"{name} has no such entry: check the names"))
    if weight.ndim < 2:
        raise refusal(
            key,
            f"has shape {weight.shape}",
            "a linear map has two axes, a convolution three or more: convert other layers by hand",
        )
    if flattened is not None:
        if weight.ndim != 2 or int(np.prod(flattened)) != weight.shape[1]:
            raise refusal(
                key,
                f"has shape {weight.shape}",
                f"flattened={tuple(flattened)} is to be (channels, *locations) of the inputs of a "
                "linear map, whose product is their number",
            )
        channels_last = weight.reshape(len(weight), *flattened)
        weight = np.moveaxis(channels_last, 1, -1).reshape(weight.shape)
    kernel = np.moveaxis(weight, (0, 1), (-1, -2))
    parts = {"kernel": jnp.asarray(kernel)}
    if bias_key in layer:
        bias = read_statistic(bias_key, layer[bias_key])
        if bias.shape != weight.shape[:1]:
            raise refusal(
                bias_key,
                f"has shape {bias.shape}, but {key} {weight.shape}",
                "a bias has one value per output: are they of the same layer?",
            )
        parts["bias"] = jnp.asarray(bias)
    return parts


def check_names(
    state_dict: Mapping[str, Any], names: Mapping[str, str], flattened: Mapping[str, Any]
) -> None:
    """Each entry belongs to one name, and each name has its own place.

    Raises:
        CheckpointError: it does not.

    >>> check_names({"fc.weight": 0}, {"fc": "Dense_0"}, {})
    """
    prefixes = {key.rpartition(".")[0] for key in map(str, state_dict)}
    for key in map(str, state_dict):
        if key.rpartition(".")[0] not in names:
            raise refusal(
                key,
                "is named nowhere",
                "give its layer a place in names, or leave it out of the state_dict",
            )
    for name in (*names, *flattened):
        if name not in prefixes or name not in names:
            raise refusal(
                name,
                f"is missing among {some(sorted(prefixes))}",
                "names and flattened have torch's names of layers as keys",
            )
    places = list(names.values())
    twice = {place for place in places if places.count(place) > 1}
    if twice:
        raise refusal(some(twice), "is given to several layers", "give each its own path in names")


def check_like(variables: Any, like: Any, count: bool) -> None:
    """Refuse variables that the model would not take.

    Raises:
        CheckpointError: paths or shapes differ.

    >>> check_like({"params": {"a": jnp.ones(2)}}, {"params": {"a": jnp.ones(2)}}, False)
    """
    ours, theirs = shapes(variables), shapes(like)
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    if missing:
        raise refusal(some(missing), "has no value", "name the layer of torch's that has it")
    if extra:
        hint = ", or count=False" if count and all(e.endswith("/count") for e in extra) else ""
        raise refusal(some(extra), "has no place in the model", f"check names{hint}")
    for path, shape in ours.items():
        if shape != theirs[path]:
            raise refusal(
                path,
                f"has shape {shape}, but the model's {theirs[path]}",
                "make the model of the same sizes, and check names",
            )


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path.

    >>> shapes({"a": {"b": np.ones(2)}})
    {'a/b': (2,)}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(part.key) for part in path): tuple(leaf.shape) for path, leaf in leaves}


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees in one; they share branches, no leaves.

    >>> merge({"a": {"b": 1}}, {"a": {"c": 2}})
    {'a': {'b': 1, 'c': 2}}
    """
    return {
        key: merge(a[key], b[key]) if key in a and key in b else (a if key in a else b)[key]
        for key in (*a, *(key for key in b if key not in a))
    }
