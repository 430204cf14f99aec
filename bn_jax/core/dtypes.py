"""In which precision statistics are taken, also where promotion is strict."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of statistics of x: x's own, and at least float32, since sums need the digits.

    Raises:
        TypeError: dtype is neither float nor complex.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"x has dtype {jnp.dtype(dtype)}, which has no fractions to normalize; "
            "convert it first, e.g. x.astype(jnp.float32)"
        )
    # By bits: promote_types(bfloat16, float32) is refused under strict promotion.
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of |x|²: complex64 has float32, and so on."""
    return jnp.finfo(dtype).dtype
