"""A quotient as it is on paper: rounded once, and the same for all who use it.

A constant feature has the constant for its mean and 0 for its variance: m values d have to give
m d / m = d, exactly. As compilers divide, they do not. XLA's CPU compiler turns one divisor of many
values into a multiplication by its rounded reciprocal, and fuses that, unrounded, into the
subtractions that use the quotient, each in its own way: two means, a bit apart, of one batch. On a
GPU, a division in float32 is off by up to 2 units in the last place, and is fused likewise.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bn_jax.core.together import batched, eagerly, instantiate

WIDE = {"float32": "float64", "complex64": "complex128"}


def quotient(part: Array, whole: Array) -> Array:
    """Part / whole, of one dtype and of one shape, or a scalar; whole is real."""
    if jax.typeof(part) != jax.typeof(whole):
        # Under shard_map and on explicit meshes: what either differs over, both do from here on.
        nothing = lax.full_like(part, -0.0), lax.full_like(whole, -0.0)
        part, whole = lax.add(part, nothing[1]), lax.add(whole, nothing[0])
    return quotient_p.bind(part, whole)


def divide(part, whole):
    """By a divisor that is part where part is NaN: which says the same, and is not one number."""
    return part / lax.select(part != part, part, whole)


def divide_in_double(part, whole):
    """By way of the reciprocal: LLVM would make the quotient one of single precision again.

    The product with a real reciprocal is off by 2⁻⁵² of itself at most, and no quotient of numbers
    of single precision is that near to the middle between two of them, where rounding could go
    either way. In other precisions there is no constant to be kept to the last bit.
    """
    if part.dtype.name not in WIDE:
        return divide(part, whole)
    with jax.enable_x64(True):  # for what is inside of the primitive, and nothing else
        wide = WIDE[part.dtype.name]
        numerator, denominator = (lax.convert_element_type(a, wide) for a in (part, whole))
        product = numerator * (jnp.ones_like(denominator) / denominator)
        return lax.convert_element_type(product, part.dtype)


def divide_op_by_op(part, whole):
    """Outside of jit."""
    return (divide_in_double if jax.default_backend() == "gpu" else divide)(part, whole)


def quotient_jvp(primals, tangents):
    """q̇ = (ṗ - q ẇ)/w."""
    (_, whole), (part_dot, whole_dot) = primals, tangents
    result, dot = quotient_p.bind(*primals), instantiate(part_dot)
    if not isinstance(whole_dot, ad.Zero):
        dot = dot - result * whole_dot
    return result, dot / whole


quotient_p = Primitive("quotient")
quotient_p.def_impl(eagerly(divide_op_by_op))
quotient_p.def_abstract_eval(lambda part, whole: part)
ad.primitive_jvps[quotient_p] = quotient_jvp
batching.primitive_batchers[quotient_p] = batched(quotient_p)
mlir.register_lowering(quotient_p, mlir.lower_fun(divide, multiple_results=False))
for gpu in ("cuda", "rocm"):
    mlir.register_lowering(
        quotient_p, mlir.lower_fun(divide_in_double, multiple_results=False), platform=gpu
    )
