"""Sums that XLA's CPU compiler computes in one pass over memory, without losing digits.

Behaviour: XLA's CPU compiler does not fuse sibling reductions, so it reads x once for each sum. It
runs a reduction with several results over leading axes without vector instructions. But if an axis
is cut into blocks that are added to each other, vector instructions reduce it to a fraction for all
results at once, and plain sums of the rest cost little.
Seen on: jaxlib 0.8 to 0.12, CPU. The compilers for GPU and TPU fuse sums by themselves.
Cost without: a training step at 64x56x56x64 in float32 takes 1.2 to 1.3 times as long.
Canary: test_sums.py, `test_xla_fuses_sibling_sums`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Axes = tuple[int, ...]
SMALL = 2**13
"""From so many values on, XLA's CPU compiler sums in parallel blocks of its own."""
FEW = 64
"""Up to so many values can be added up one by one at a loss of about 1.5 units of roundoff."""


def add_together(arrays: Sequence[Array], axes: Axes, alone: bool) -> list[Array]:
    """The sums of several arrays of one shape, in one pass; summed axes are kept with length 1.

    On several devices with an Auto mesh, no axis is cut: types do not say how x is sharded there.
    """
    shape = arrays[0].shape
    sharding_known = alone or jax.typeof(arrays[0]).sharding.mesh.are_all_axes_explicit
    exact_enough = lambda parts: len(axes) == 1 or sums_well(arrays[0], axes, parts)  # noqa: E731
    worth_it = (
        sharding_known
        and len(shape) < 7
        and isinstance(arrays[0].size, int)
        and arrays[0].size >= SMALL
    )
    for axis in local_axes(arrays[0], axes, alone) if worth_it else ():
        blocks = max(
            (n for n in range(4, 17) if shape[axis] % n == 0 and exact_enough(n)), default=0
        )
        if blocks:
            cut = (*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
            arrays = lax.reduce(
                tuple(array.reshape(cut) for array in arrays),
                tuple(np.zeros((), array.dtype) for array in arrays),
                lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
                (axis,),
            )
            break
    return [add_up(array, axes) for array in arrays]


def add_up(array: Array, axes: Axes) -> Array:
    """The sum over some axes, which are kept with length 1.

    Behaviour: XLA's CPU compiler adds up several axes one number after the other, which loses
    digits. A barrier keeps XLA from merging a sum over the last axes with one over the first.
    Seen on: jaxlib before 0.10 for all arrays, since then for those of less than 2¹³ values.
    Cost without: sums of 4,032 squares are off by up to 7 units of roundoff instead of 1.5.
    Canary: test_sums.py, `test_xla_adds_small_arrays_in_blocks`.
    """
    in_blocks = jax.__version_info__ >= (0, 10) and sums_well(array, axes)
    if len(axes) > 1 and not in_blocks:
        array = lax.optimization_barrier(jnp.sum(array, axes[1:], keepdims=True))
        axes = axes[:1]
    return jnp.sum(array, axes, keepdims=True)


def local_axes(x: Array, axes: Axes, alone: bool) -> list[int]:
    """Those of some axes along which x lies on one device, the best to cut first.

    Not those that an Explicit mesh shards. The leading one, which a batch is sharded by, comes
    last, and only if the program runs on one device.
    """
    inner = [axis for axis in axes[1:] if jax.typeof(x).sharding.spec[axis] is None]
    return inner + (list(axes[:1]) if alone else [])


def sums_well(array: Array, axes: Axes, parts: int = 1) -> bool:
    """Whether a plain sum over 1/parts of an array keeps its digits.

    It does if that part is large, or if it has few values for each sum. An array of symbolic size
    (jax.export) may be of any size.
    """
    if not isinstance(array.size, int):
        return False
    return (
        array.size // parts >= SMALL
        or math.prod(array.shape[axis] for axis in axes) // parts <= FEW
    )
