"""An array as it lies in memory.

Of half precision that comes out of wider arithmetic, XLA's CPU compiler would rather keep the wide
array it was rounded from, for the backward pass too: twice the memory, and other values than those
that are seen. On other devices, these are nothing but names.
"""

from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bn_jax.core.dtypes import statistics_dtype


def stored(x: Array) -> Array:
    """X itself, rounded to its dtype and kept so."""
    return x if x.dtype == statistics_dtype(x.dtype) else stored_p.bind(x)


stored_p = Primitive("stored")
stored_p.def_impl(lambda x: x)
stored_p.def_abstract_eval(lambda x: x)
ad.deflinear2(stored_p, lambda cotangent, _: [cotangent])
batching.defvectorized(stored_p)
mlir.register_lowering(stored_p, mlir.lower_fun(lambda x: x, multiple_results=False))
mlir.register_lowering(
    stored_p, mlir.lower_fun(lax.optimization_barrier, multiple_results=False), platform="cpu"
)
