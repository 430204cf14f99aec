"""Scale and bias that are given in a layer's call: per feature, or one row per example.

Conditional batch norm takes a row of a table for each example, and FiLM what another network
computes. The core knows numbers per feature only. So what differs between the examples is applied
to the core's y; the rest goes into the core.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.normalize import BatchNormParams

NONE = BatchNormParams(None, None)
FLAX = {"scale": "use_scale=False", "bias": "use_bias=False"}
"""What flax calls both, and how a layer is made without."""


def own_or_given(
    own: BatchNormParams, given: tuple[Any, Any], without: Mapping[str, str] = FLAX
) -> BatchNormParams:
    """The layer's own scale and bias, or those of the call.

    Args:
        own: what the layer has.
        given: in the call.
        without: what the layer calls them, and how it is made without.

    Raises:
        ValueError: the layer has its own, and the call gives another.
    """
    for mine, other, (name, remedy) in zip(own, given, without.items(), strict=True):
        if mine is not None and other is not None:
            raise ValueError(
                f"{name} is given in the call, but the layer has its own; make it with {remedy}"
            )
    given = BatchNormParams(*(None if part is None else jnp.asarray(part) for part in given))
    return BatchNormParams(*(a if b is None else b for a, b in zip(own, given, strict=True)))


def split_affine(
    params: BatchNormParams, x: Array, axes: tuple[int, ...]
) -> tuple[BatchNormParams, BatchNormParams]:
    """What the core applies, and what `apply_affine` applies to the core's y.

    Args:
        params: scale and bias, each of the features' shape, with one row per example, or of x's
            rank and broadcastable to it; or None.
        x: the data.
        axes: its feature axes, sorted.

    Raises:
        ValueError: a shape fits neither way.

    >>> x = jnp.ones((2, 5, 5, 3))
    >>> inside, outside = split_affine(BatchNormParams(jnp.ones((2, 3)), jnp.zeros(3)), x, (3,))
    >>> inside.scale, outside.scale.shape, outside.bias.shape
    (None, (2, 1, 1, 3), (1, 1, 1, 3))
    """
    features = tuple(x.shape[axis] for axis in axes)
    if all(part is None or part.shape == features for part in params):
        return params, NONE
    scale, bias = (
        None if part is None else bring_in(name, part, x, axes, features)
        for name, part in params._asdict().items()
    )
    return NONE, BatchNormParams(scale, bias)


def bring_in(
    name: str, part: Array, x: Array, axes: tuple[int, ...], features: tuple[int, ...]
) -> Array:
    """Scale or bias with x's rank."""
    examples = next((axis for axis in range(x.ndim) if axis not in axes), None)
    full = part.shape
    if full == features:
        full = tuple(n if axis in axes else 1 for axis, n in enumerate(x.shape))
    elif part.ndim == len(axes) + 1 < x.ndim:
        rows, sizes = full[0], iter(full[1:])
        full = tuple(
            next(sizes) if axis in axes else rows if axis == examples else 1
            for axis in range(x.ndim)
        )
    if len(full) != x.ndim or any(a not in (1, b) for a, b in zip(full, x.shape, strict=True)):
        raise ValueError(
            f"{name} has shape {part.shape}, but x has shape {x.shape}; give {features}, one row "
            f"of that per example, or x's rank with axes of length 1"
        )
    return part.reshape(full)


def apply_affine(y: Array, params: BatchNormParams) -> Array:
    """y·scale + bias, of x's rank, computed in at least float32."""
    scale, bias = params
    if scale is None and bias is None:
        return y
    wide = y.astype(statistics_dtype(y.dtype))
    wide = wide if scale is None else wide * scale.astype(wide.dtype)
    wide = wide if bias is None else wide + bias.astype(wide.dtype)
    return wide.astype(y.dtype)
