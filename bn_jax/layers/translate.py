"""Translates flax's arguments into the core's, for the linen and the nnx layer.

For example: flax's rule for the dtype of the result, flax's masks, and the moving average that a
`momentum` stands for.
"""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from bn_jax.core.averages import Average, Ema
from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.normalize import BatchNormParams


def promote(x: Array, params: BatchNormParams, dtype: DTypeLike | None) -> tuple[Array, jnp.dtype]:
    """Convert x if the result is wider, and return it with the result's dtype by flax's rule.

    The result has `dtype`, or if that is None the common dtype of x, scale and bias: a bfloat16 x
    and float32 parameters give float32. Integers become float32, as in flax. The common dtype
    follows JAX's standard promotion rules, even where the user has set strict ones.

    Raises:
        ValueError: dtype is not inexact.

    >>> params = BatchNormParams(scale=jnp.ones(2), bias=None)
    >>> x, result = promote(jnp.ones((3, 2), jnp.bfloat16), params, None)
    >>> x.dtype.name, result.name
    ('float32', 'float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        result = jnp.dtype(canonicalize_dtype(x, *params, dtype=dtype))
        own = x.dtype
        if not jnp.issubdtype(own, jnp.inexact):
            own = jnp.promote_types(own, jnp.float32)
        return x.astype(jnp.promote_types(own, result)), result


def mean_dtype(*dtypes: DTypeLike | None) -> jnp.dtype:
    """The dtype of the running mean: float32, or complex64 if any of the dtypes is complex.

    >>> mean_dtype(jnp.bfloat16, None).name, mean_dtype(jnp.float32, jnp.complex64).name
    ('float32', 'complex64')
    """
    known = [dtype for dtype in dtypes if dtype is not None]
    is_complex = any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in known)
    return jnp.dtype(jnp.complex64 if is_complex else jnp.float32)


def batches_seen(count: Array | None, mean: Array) -> Array:
    """The count for the core: 0 without a count variable; floats become at least float32."""
    if count is None:
        return jnp.zeros_like(mean, jnp.float32)
    is_float = jnp.issubdtype(count.dtype, jnp.floating)
    return count.astype(statistics_dtype(count.dtype)) if is_float else count


def flax_average(momentum: Any) -> Average:
    """The moving average of a flax `momentum`, which may be traced, or hold a value per feature.

    >>> flax_average(0.9)
    Ema(decay=0.9)
    """
    return PerFeatureEma(momentum) if np.ndim(momentum) else Ema(momentum)


@dataclasses.dataclass(frozen=True)
class PerFeatureEma:
    """An exponential moving average with one decay per feature.

    >>> average = PerFeatureEma(jnp.array([0.0, 0.5]))
    >>> average.new_weight(0).tolist()
    [1.0, 0.5]
    """

    decay: Array

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The weight of the past, per feature."""
        return self.decay

    def new_weight(self, count: ArrayLike) -> ArrayLike:
        """The weight of the new batch, per feature."""
        return 1 - self.decay


def read_mask(mask: ArrayLike | None, x: Array, axes: tuple[int, ...]) -> Array | np.ndarray | None:
    """A mask of flax's as the core's `where`.

    A mask of x's rank is passed on. A mask of lower rank can mean two things: one value per
    example, as in the core (x's shape without its feature axes), or x's last axes, as in flax.
    Integers count values, as in the core; for 0 and 1 that is flax's meaning too.

    Raises:
        ValueError: both meanings fit x's shape, and they differ.

    >>> read_mask(jnp.array([True, False, True]), jnp.ones((3, 2)), (1,)).shape
    (3,)
    >>> read_mask(jnp.array([[1], [0]]), jnp.ones((3, 2, 5)), (2,)).shape
    (1, 2, 1)
    """
    if mask is None:
        return None
    if not isinstance(mask, Array | np.ndarray):
        mask = np.asarray(mask)
    if mask.ndim >= x.ndim:
        return mask
    last = (1,) * (x.ndim - mask.ndim) + mask.shape
    lengths = iter(mask.shape)
    each = tuple(1 if axis in axes else next(lengths, 0) for axis in range(x.ndim))
    fits_last = fits(last, x.shape)
    fits_each = mask.ndim == x.ndim - len(axes) and fits(each, x.shape)
    if fits_last and fits_each and last != each:
        raise ValueError(
            f"mask of shape {mask.shape} fits x of shape {x.shape} in two ways: one value per "
            f"example, {each}, or along x's last axes, {last}; say which by giving it x's rank, "
            f"e.g. mask.reshape({each})"
        )
    return mask.reshape(last) if fits_last else mask


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether this shape broadcasts to a target shape of the same rank."""
    return all(a in (1, b) for a, b in zip(shape, target, strict=True))


def check_flag(use_running_average: object) -> None:
    """Refuse a traced flag, because the program depends on which statistics are used.

    Raises:
        TypeError: use_running_average is traced.
    """
    if isinstance(use_running_average, jax.core.Tracer):
        raise TypeError(
            "use_running_average is traced, but must be a Python bool: mark it static, e.g. "
            "jax.jit(f, static_argnames='train'), or bind it, functools.partial(f, train=True)"
        )
