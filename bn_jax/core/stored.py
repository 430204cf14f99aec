"""An array as it lies in memory, where a compiler would rather have it otherwise.

Barriers, each for one kind of device; on the others, they are nothing but names.
"""

from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bn_jax.core.dtypes import statistics_dtype


def stored(x: Array) -> Array:
    """X itself, rounded to its dtype and kept so.

    Of half precision that comes out of wider arithmetic, XLA's CPU compiler would rather keep the
    wide array it was rounded from, for the backward pass too: twice the memory, and other values
    than those that are seen.
    """
    return x if x.dtype == statistics_dtype(x.dtype) else stored_p.bind(x)


def computed_once(values: Array) -> Array:
    """Values that are the same for all who use them.

    XLA's GPU compiler would rather make a small sum anew in each kernel that uses it, and add it up
    in another order there.
    """
    return once_p.bind(values)


def barrier(name: str, *platforms: str) -> Primitive:
    """A primitive that changes nothing, behind which some compilers do not look."""
    primitive = Primitive(name)
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    ad.deflinear2(primitive, lambda cotangent, _: [cotangent])
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x: x, multiple_results=False))
    kept = mlir.lower_fun(lax.optimization_barrier, multiple_results=False)
    for platform in platforms:
        mlir.register_lowering(primitive, kept, platform=platform)
    return primitive


stored_p = barrier("stored", "cpu")
once_p = barrier("computed_once", "cuda", "rocm")
