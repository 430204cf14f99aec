"""Copies of arrays that XLA's CPU compiler takes for different arrays.

Where two sums use x - origin (or x in a wider dtype), that compiler computes it once, writes it to
memory, and reads it twice. For data beyond its caches that takes twice as long as two sums that
each read x and subtract on the way. On other devices, whose compilers fuse by themselves, these
copies are nothing but names.
"""

from typing import TypeVar

import jax
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = TypeVar("Arrays", bound=tuple[Array, ...])


def apart(values: Arrays, copies: int) -> list[Arrays]:
    """Copies of a tuple of arrays, at no cost in time or memory."""
    leaves, treedef = jax.tree.flatten(values)
    flat = apart_p.bind(*leaves, copies=copies)
    size = len(leaves)
    return [treedef.unflatten(flat[n * size : (n + 1) * size]) for n in range(copies)]


def repeat(*values, copies):
    """The values themselves, some times over."""
    return list(values) * copies


def repeat_behind_barrier(*values, copies):
    """The same, where XLA does not see that it is."""
    return lax.optimization_barrier(repeat(*values, copies=copies))


apart_p = Primitive("apart")
apart_p.multiple_results = True
apart_p.def_impl(repeat)
apart_p.def_abstract_eval(repeat)
ad.primitive_jvps[apart_p] = lambda primals, tangents, *, copies: (
    apart_p.bind(*primals, copies=copies),
    repeat(*tangents, copies=copies),
)
batching.primitive_batchers[apart_p] = lambda values, dims, *, copies: (
    apart_p.bind(*values, copies=copies),
    repeat(*dims, copies=copies),
)
mlir.register_lowering(apart_p, mlir.lower_fun(repeat))
mlir.register_lowering(apart_p, mlir.lower_fun(repeat_behind_barrier), platform="cpu")
