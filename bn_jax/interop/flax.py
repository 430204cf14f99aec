"""Converts flax.linen.BatchNorm and flax.nnx.BatchNorm, from and to variables or a State.

flax's `momentum` is our decay. Its running variance is biased, and its average starts from mean 0
and variance 1 without debiasing: `Ema`. There is no count of batches, unless one of our layers
wrote it. To go on in Flax, nothing has to be converted, because our layers read flax's checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bn_jax.core.averages import Ema
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import BatchNormState
from bn_jax.interop.checks import (
    checkpoint_error,
    read_mapping,
    refuse_extra,
    require,
    some,
)
from bn_jax.interop.settings import (
    Settings,
    as_settings,
    decay_of,
    read_epsilon,
    read_outgoing,
)
from bn_jax.interop.values import Values, read_layer

Path = str | tuple[str | int, ...]
"""The keys down to a layer, as a tuple or joined by slashes: "ResidualBlock_0/BatchNorm_0"."""


def from_flax(
    variables: Mapping[Any, Any],
    path: Path = (),
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    count: int | None = None,
    values_per_feature: float | None = None,
) -> tuple[BatchNormParams, BatchNormState, Settings]:
    """Convert one BatchNorm of a flax model's variables.

    Args:
        variables: linen's, with params and batch_stats; or nnx.state(model), or a plain dict of it.
        path: the keys down to the layer.
        momentum: of the layer's constructor.
        epsilon: of the layer's constructor.
        count: the number of batches seen. None takes `count` in the variables, which our layers
            with an `average` keep, or 0. It matters for averages that depend on it, such as
            `DebiasedEma`. 0 means unknown: if the statistics are not those of a new layer, it
            becomes `bn_jax.core.state.LOADED`.
        values_per_feature: m, to convert the variance to the core's unbiased one by m/(m - 1).
            None copies flax's biased one. See `bn_jax.interop.settings`.

    Returns:
        (params, state, settings), of any feature shape.

    Raises:
        CheckpointError: an entry is missing, unknown, of the wrong shape, not finite, or not an
            array; the variance is negative.
        ValueError: momentum is outside [0, 1], epsilon is negative, or values_per_feature is not
            above 1.

    >>> import numpy as np
    >>> variables = {"params": {"bn": {"scale": np.ones(2)}},
    ...     "batch_stats": {"bn": {"mean": np.zeros(2), "var": np.ones(2)}}}
    >>> params, state, settings = from_flax(variables, "bn")
    >>> params.bias, state.count.tolist(), settings["average"]
    (None, [0, 0], Ema(decay=0.99))
    """
    path = keys_of(path)
    remedy = "pass what init returned, or nnx.state(model); nothing is unpickled here"
    variables = read_mapping("variables", variables, remedy)
    if "batch_stats" in variables or "params" in variables:
        remedy = "pass all variables, with the collections params and batch_stats"
        statistics = descend(require(variables, "batch_stats", remedy), path, "batch_stats")
        # A layer without scale and bias has no entry in params.
        affine = descend(variables.get("params", {}), path, "params", missing={})
        found = {**affine, **statistics}
    else:
        found = dict(descend(variables, path, "state"))
    name = "/".join(map(str, path)) or "variables"
    known = ("scale", "bias", "mean", "var", "count")
    refuse_extra(
        map(str, found), known, f"{name} is not a BatchNorm: give the keys down to one as path"
    )
    remedy = f"{name} is not a BatchNorm, or its batch_stats were not saved"
    values = {
        "scale": found.get("scale"),
        "bias": found.get("bias"),
        "mean": require(found, "mean", remedy),
        "var": require(found, "var", remedy),
    }
    names = {field: f"{name}.{field}" for field in known}
    seen = found.get("count", 0) if count is None else count
    params, state = read_layer(values, names, count=seen, vector=False)
    state, settings = as_settings(state, Ema(float(momentum)), epsilon, values_per_feature)
    return params, state, settings


def to_flax(
    params: BatchNormParams,
    state: BatchNormState,
    settings: Settings,
    path: Path = (),
    *,
    count: bool = False,
    values_per_feature: float | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert to the linen variables of one BatchNorm, and the arguments for its constructor.

    For an nnx layer, `nnx.update(layer, variables["params"] | variables["batch_stats"])`.

    Args:
        params: our parameters.
        state: our state.
        settings: average, epsilon and unbiased, as the `from_…` functions return them.
        path: the keys down to the layer.
        count: write `count` too, for our layers with an `average`, `BatchNorm(**settings)`. flax's
            own layers have no such variable.
        values_per_feature: m, to convert an unbiased variance to flax's biased one by (m - 1)/m.
            None copies it. `bn_jax.interop.settings` explains when this matters.

    Returns:
        (variables, arguments): {"params": ..., "batch_stats": ...}; momentum, epsilon, use_scale
        and use_bias for flax's `BatchNorm(**arguments)`.

    Raises:
        CheckpointError: a value is malformed, or flax does not have this average.
        ValueError: values_per_feature is not above 1.

    >>> import jax, bn_jax as bn
    >>> settings = {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": False}
    >>> variables, arguments = to_flax(*bn.init(2), settings, "bn")
    >>> jax.tree.map(jnp.shape, variables["batch_stats"]), arguments["momentum"]
    ({'bn': {'mean': (2,), 'var': (2,)}}, 0.9)
    """
    ours = read_outgoing(
        params,
        state,
        settings,
        unbiased=False,
        values_per_feature=values_per_feature,
        vector=False,
    )
    arguments = {
        "momentum": decay_of(settings, "flax"),
        "epsilon": read_epsilon(settings["epsilon"]),
        "use_scale": params.scale is not None,
        "use_bias": params.bias is not None,
    }
    return variables_of(ours, path, count=count), arguments


def variables_of(ours: Values, path: Path, *, count: bool) -> dict[str, Any]:
    """The linen variables of one BatchNorm.

    >>> mean, var, seen = jnp.zeros((3, 2))
    >>> sorted(variables_of(Values(None, None, mean, var, seen), "bn", count=True))
    ['batch_stats']
    """
    collections = {
        "params": ("scale", "bias"),
        "batch_stats": ("mean", "var", "count") if count else ("mean", "var"),
    }
    variables: dict[str, Any] = {}
    for collection, fields in collections.items():
        leaves = {f: jnp.asarray(value) for f in fields if (value := getattr(ours, f)) is not None}
        if leaves:
            variables[collection] = nest(keys_of(path), leaves)
    return variables


def keys_of(path: Path) -> tuple[str | int, ...]:
    """A path as a tuple.

    >>> keys_of("block/bn"), keys_of(("layers", 0)), keys_of("")
    (('block', 'bn'), ('layers', 0), ())
    """
    return tuple(key for key in path.split("/") if key) if isinstance(path, str) else tuple(path)


def descend(tree: Any, path: tuple[str | int, ...], name: str, *, missing: Any = None) -> Any:
    """The branch of a tree at a path. Indices in lists may be written as numbers or as digits.

    Raises:
        CheckpointError: there is no such branch, and `missing` is None.

    >>> descend({"layers": {0: {"bn": {"mean": 1}}}}, ("layers", "0", "bn"), "state")
    {'mean': 1}
    """
    for depth, key in enumerate(path):
        branch = tree if isinstance(tree, Mapping) else {}
        if key not in branch and isinstance(key, str) and key.isdigit():
            key = int(key)
        if key not in branch:
            if missing is not None:
                return missing
            raise checkpoint_error(
                "/".join(map(str, (name, *path[: depth + 1]))),
                f"is missing among {some(branch)}",
                "give the keys down to one BatchNorm as path",
            )
        tree = branch[key]
    if not isinstance(tree, Mapping):
        raise checkpoint_error(
            "/".join(map(str, (name, *path))),
            f"is {type(tree).__name__}, not a mapping",
            "pass variables or nnx.state(model), and the keys down to one BatchNorm as path",
        )
    return tree


def nest(path: tuple[str | int, ...], leaves: Any) -> Any:
    """A nested dict with `leaves` at the end of a path.

    >>> nest(("a", "b"), 1)
    {'a': {'b': 1}}
    """
    for key in reversed(path):
        leaves = {key: leaves}
    return leaves
