"""Division that is rounded once, with the same quotient wherever it is used.

m values of a constant d have to give m·d / m = d exactly, so that the mean of a constant feature is
its constant, and its variance 0.

Behaviour: XLA's CPU compiler replaces division by a uniform divisor with multiplication by its
rounded reciprocal, and fuses the product, unrounded, into subtractions that use it. On a GPU,
float32 division is off by up to 2 units in the last place.
Seen on: jaxlib 0.8 to 0.12 on CPU, 0.11.2 on an H100.
Cost without: at epsilon 0, a constant feature of 61 or 97 values comes out up to 3e-4 off.
Canary: test_division.py, `test_xla_divides_exactly`.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax.core.xla.primitives import operation

DOUBLE = {"float32": "float64", "complex64": "complex128"}


def divide(part: Array, whole: Array) -> Array:
    """Part / whole, of one shape; whole is real or of part's dtype."""
    whole = whole.astype(part.dtype)
    if jax.typeof(whole) != jax.typeof(part):  # on a mesh, or within shard_map
        part, whole = part + jnp.zeros_like(whole), whole + jnp.zeros_like(part)
    return bind_divide(part, whole)[0]


def quotient(part: Array, whole: Array) -> list[Array]:
    """As JAX divides."""
    return [part / whole]


def by_varying_divisor(part: Array, whole: Array, *, alone: bool) -> list[Array]:
    """By a divisor that is not uniform, as far as XLA can tell, so it takes no reciprocal."""
    del alone
    return [part / lax.select(part != part, part, whole)]


def in_double(part: Array, whole: Array, *, alone: bool) -> list[Array]:
    """In double precision, by the reciprocal, which is off by 2⁻⁵² at most.

    No quotient of float32 numbers is that close to the middle between two others, so the result is
    rounded right. Dividing in double would not do: LLVM turns that into a float32 division again.
    """
    if part.dtype.name not in DOUBLE:
        return by_varying_divisor(part, whole, alone=alone)
    with jax.enable_x64(True):  # for these three operations only
        wide = [lax.convert_element_type(a, DOUBLE[part.dtype.name]) for a in (part, whole)]
        return [lax.convert_element_type(wide[0] * lax.reciprocal(wide[1]), part.dtype)]


def divide_jvp(operands, tangents):
    """q̇ = (ṗ - q ẇ)/w."""
    (part_dot, whole_dot), (result,) = tangents, bind_divide(*operands)
    if whole_dot is not None:
        moved = result * whole_dot
        part_dot = -moved if part_dot is None else part_dot - moved
    return [result], [None if part_dot is None else part_dot / operands[1]]


bind_divide = operation(
    "divide",
    quotient,
    lambda part, whole: [part],
    on={"cpu": by_varying_divisor, "cuda": in_double, "rocm": in_double},
    jvp=divide_jvp,
)
