"""Converts keras.layers.BatchNormalization, from and to its weights, as a list or by name.

keras calls the values `gamma`, `beta`, `moving_mean` and `moving_variance`. Its `momentum` is our
decay. ε is 1e-3 by default, a hundred times ours. The running variance is biased, and there is no
count of batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bn_jax.core.averages import Ema
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import BatchNormState
from bn_jax.interop.checks import checkpoint_error, refuse_extra, require, some
from bn_jax.interop.settings import (
    Settings,
    as_settings,
    decay_of,
    read_epsilon,
    read_outgoing,
)
from bn_jax.interop.values import read_layer

NAMES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def from_keras(
    weights: Mapping[str, Any] | Sequence[Any],
    prefix: str = "",
    *,
    scale: bool | None = None,
    center: bool | None = None,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    count: int = 0,
    values_per_feature: float | None = None,
) -> tuple[BatchNormParams, BatchNormState, Settings]:
    """Convert the weights of one keras BatchNormalization.

    Args:
        weights: `layer.get_weights()`; or arrays or variables by name, nested or not. A name is a
            variable's path ("bn/gamma"), or leads through the groups of an open HDF5 file, as
            keras writes them to .h5 ("bn/bn/gamma:0") and to .weights.h5 ("layers/bn/vars/0").
        prefix: for weights by name: the layer's name, with as many names around it as are needed
            to tell it from others.
        scale: of the layer's constructor. Needed only for a list of three weights.
        center: of the layer's constructor. Needed only for a list of three weights.
        momentum: of the layer's constructor.
        epsilon: of the layer's constructor.
        count: the number of batches seen, which keras does not keep. It matters for averages that
            depend on it, such as `DebiasedEma`. 0 means unknown: if the statistics are not those
            of a new layer, it becomes `bn_jax.core.state.LOADED`.
        values_per_feature: m, to convert the variance to the core's unbiased one by m/(m - 1).
            None copies keras' biased one. See `bn_jax.interop.settings`.

    Returns:
        (params, state, settings). scale or bias is None where gamma or beta is absent.

    Raises:
        CheckpointError: an entry is missing, unknown, of the wrong shape, not finite, or not an
            array; the variance is negative; a list of three is ambiguous.
        ValueError: momentum is outside [0, 1], epsilon is negative, or values_per_feature is not
            above 1.

    >>> import numpy as np
    >>> gamma, beta, mean, variance = np.array([[2.0], [0.5], [1.0], [4.0]], np.float32)
    >>> params, state, settings = from_keras([gamma, beta, mean, variance])
    >>> params.scale.tolist(), state.var.tolist(), settings["epsilon"], settings["unbiased"]
    ([2.0], [4.0], 0.001, False)
    """
    if isinstance(weights, Mapping):
        found = by_name(weights, prefix)
        if found and all(name.isdigit() for name in found):
            found = in_order(list(found.values()), scale, center)
    else:
        found = in_order(weights, scale, center)
    for name, wanted in (("gamma", scale), ("beta", center)):
        if wanted is not None and wanted != (name in found):
            raise checkpoint_error(
                name,
                f"is {'missing' if wanted else 'present'}",
                "scale (for gamma) and center (for beta) say otherwise: pass them as in the "
                "layer's constructor",
            )
    remedy = "every BatchNormalization has it: pass all of its weights"
    values = {
        "scale": found.get("gamma"),
        "bias": found.get("beta"),
        "mean": require(found, "moving_mean", remedy),
        "var": require(found, "moving_variance", remedy),
    }
    params, state = read_layer(values, NAMES, count=count)
    state, settings = as_settings(state, Ema(float(momentum)), epsilon, values_per_feature)
    return params, state, settings


def to_keras(
    params: BatchNormParams,
    state: BatchNormState,
    settings: Settings,
    *,
    values_per_feature: float | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Convert to the weights of one keras BatchNormalization, and its constructor's arguments.

    Args:
        params: our parameters, of shape [features].
        state: our state. Its count is dropped, because keras keeps none.
        settings: average, epsilon and unbiased, as the `from_…` functions return them.
        values_per_feature: m, to convert an unbiased variance to keras' biased one by (m - 1)/m.
            None copies it. `bn_jax.interop.settings` explains when this matters.

    Returns:
        (weights, arguments): weights by name; momentum, epsilon, scale and center for
        `BatchNormalization(**arguments)`. Once the layer is built,
        `layer.set_weights(list(weights.values()))` takes the weights in this order.

    Raises:
        CheckpointError: a value is malformed, or keras does not have this average.
        ValueError: values_per_feature is not above 1.

    >>> import bn_jax as bn
    >>> settings = {"average": bn.Ema(0.99), "epsilon": 1e-3, "unbiased": False}
    >>> weights, arguments = to_keras(*bn.init(3, use_bias=False), settings)
    >>> list(weights), arguments
    (['gamma', 'moving_mean', 'moving_variance'], \
{'momentum': 0.99, 'epsilon': 0.001, 'scale': True, 'center': False})
    """
    ours = read_outgoing(
        params, state, settings, unbiased=False, values_per_feature=values_per_feature
    )
    weights = {}
    for field, name in NAMES.items():
        value = getattr(ours, field)
        if value is not None:
            weights[name] = value
    arguments = {
        "momentum": decay_of(settings, "keras"),
        "epsilon": read_epsilon(settings["epsilon"]),
        "scale": params.scale is not None,
        "center": params.bias is not None,
    }
    return weights, arguments


def by_name(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The weights of the layer that prefix names, by their last name, which may be a number.

    Raises:
        CheckpointError: some weights are not a batch norm's, or prefix fits several layers.

    >>> by_name({"bn/gamma:0": 1, "dense/kernel:0": 2}, "bn")
    {'gamma': 1}
    >>> by_name({"model_weights": {"bn": {"net": {"bn": {"gamma:0": 1}}}}}, "bn")
    {'gamma': 1}
    >>> by_name({"layers/bn/vars/1": 2, "layers/bn/vars/0": 1}, "bn")
    {'0': 1, '1': 2}
    """
    wanted = tuple(prefix.strip("/").split("/")) if prefix else ()
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, value in sorted(leaves(weights), key=lambda leaf: leaf[0]):
        *group, name = path
        starts = range(len(group) - len(wanted) + 1)
        if any(tuple(group[at : at + len(wanted)]) == wanted for at in starts):
            groups.setdefault(tuple(group), {})[name.split(":")[0]] = value
    if len(groups) > 1:
        names = some("/".join(group) for group in groups)
        raise checkpoint_error(
            f"prefix {prefix!r}",
            f"fits the weights of {names}",
            "give one of these as prefix, or enough of one to be unique",
        )
    found = next(iter(groups.values()), {})
    if not found and wanted:
        names = some(dict.fromkeys("/".join(path[:-1]) for path, _ in leaves(weights)))
        raise checkpoint_error(
            f"prefix {prefix!r}",
            f"fits none of {names}",
            "give the layer's name as it is written between slashes",
        )
    if all(name.isdigit() for name in found):
        return dict(sorted(found.items(), key=lambda item: int(item[0])))
    refuse_extra(
        found,
        NAMES.values(),
        f"{'/'.join(next(iter(groups)))!r} is not a BatchNormalization: give the name of one as "
        "prefix. The weights of renorm=True (moving_stddev, renorm_mean, renorm_stddev) have no "
        "counterpart here: leave them out, because evaluation does not use them",
    )
    return found


def leaves(weights: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every array, with the names that lead to it.

    >>> list(leaves({"a/b": {"c": 1}}))
    [(('a', 'b', 'c'), 1)]
    """
    if isinstance(weights, Mapping):
        for name, value in weights.items():
            names = (*path, *str(name).strip("/").split("/"))
            known = names[-1].split(":")[0] in NAMES.values()  # whatever it holds
            yield from [(names, value)] if known else leaves(value, names)
    else:
        yield path, weights


def in_order(weights: Sequence[Any], scale: bool | None, center: bool | None) -> dict[str, Any]:
    """Name the weights in the list that get_weights returns: gamma and beta first, if present.

    Raises:
        CheckpointError: it is not a list of two to four arrays; or there are three, and neither
            scale nor center says which.

    >>> in_order([1, 2, 3], None, False)
    {'gamma': 1, 'moving_mean': 2, 'moving_variance': 3}
    """
    if isinstance(weights, bytes | str) or not isinstance(weights, Sequence):
        raise checkpoint_error(
            "weights",
            f"are {type(weights).__name__}, neither a list nor a mapping",
            "pass layer.get_weights(); nothing is unpickled here",
        )
    size = len(weights)
    if size == 3 and scale is None and center is None:
        raise checkpoint_error(
            "weights",
            "are three, and the first may be gamma or beta",
            "pass scale=False or center=False, as in the layer's constructor",
        )
    if size not in (2, 3, 4):
        raise checkpoint_error(
            "weights",
            f"are {size} arrays",
            "a BatchNormalization has two to four: gamma, beta, moving_mean, moving_variance. With "
            "renorm=True, pass the first four",
        )
    has_gamma = scale if scale is not None else size == 4 or (size == 3 and not center)
    has_beta = center if center is not None else size == 4 or (size == 3 and not has_gamma)
    affine = ["gamma"] * has_gamma + ["beta"] * has_beta
    names = [*affine, "moving_mean", "moving_variance"]
    if len(names) != size:
        raise checkpoint_error(
            "weights",
            f"are {size} arrays, not {names}",
            "pass scale and center as in the layer's constructor",
        )
    return dict(zip(names, weights, strict=True))
