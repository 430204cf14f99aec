"""Rounding y to half precision such that it can be had again for nothing.

XLA's CPU compiler counts a conversion to bfloat16 as expensive: what comes out of one it keeps, for
all who use it, where of float32 it computes again whatever costs a few operations. Among
convolutions and ReLUs, y would be kept for the backward pass in addition to x. But a bfloat16 is
the first half of a float32, and bits are cheap (since jaxlib 0.10; before, y is kept either way).
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike


def rounded(values: Array, dtype: DTypeLike) -> Array:
    """Values in a dtype, to the nearest, ties to even."""
    return values if values.dtype == dtype else rounded_p.bind(values, dtype=jnp.dtype(dtype))


def convert(values, *, dtype):
    """As JAX does."""
    return lax.convert_element_type(values, dtype)


def cut(values, *, dtype):
    """The same by bits, where they are those of a bfloat16 and 16 more: zeros after rounding."""
    if (values.dtype, dtype) != (jnp.float32, jnp.bfloat16):
        return convert(values, dtype=dtype)
    bits = lax.bitcast_convert_type(lax.reduce_precision(values, 8, 7), jnp.uint32)
    first = lax.convert_element_type(bits >> 16, jnp.uint16)
    return lax.bitcast_convert_type(first, dtype)


def transpose(cotangent, values, *, dtype):
    """Linear, as far as derivatives are concerned."""
    return [convert(cotangent, dtype=values.aval.dtype)]


rounded_p = Primitive("rounded")
rounded_p.def_impl(convert)
rounded_p.def_abstract_eval(lambda values, *, dtype: values.update(dtype=dtype, weak_type=False))
ad.deflinear2(rounded_p, transpose)
batching.defvectorized(rounded_p)
mlir.register_lowering(rounded_p, mlir.lower_fun(convert, multiple_results=False))
mlir.register_lowering(rounded_p, mlir.lower_fun(cut, multiple_results=False), platform="cpu")
