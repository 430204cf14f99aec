"""Barriers: values that compilers must take from memory and not compute again in another way.

1. Behaviour: XLA's CPU compiler may keep the float32 value behind a bfloat16 array, for the
   backward pass too. It counts a conversion to bfloat16 as expensive, so it stores the result where
   it would compute other cheap results again.
   Seen on: jaxlib 0.10 to 0.12, CPU. On other platforms, these functions are plain conversions.
   Cost without: of a stack of convolutions, norms and ReLUs, each layer keeps 4 times x if only the
   conversion is plain, and 5 times x if x is not held either, instead of 3 times.
   Canary: test_barriers.py, `test_xla_keeps_half_precision`.
2. Behaviour: XLA's GPU compiler computes a small sum again in each kernel that uses it, and adds it
   up in another order there.
   Seen on: jaxlib 0.11.2, H100.
   Cost without: at a mean of 10⁴ standard deviations, y is off by 1e-3 for channels-first images.
   Canary: test_barriers.py, `test_xla_sums_once` (needs a GPU).
3. Behaviour: `jax.checkpoint` computes everything again unless a policy recognizes it. Policies
   know names (`checkpoint_name`), for which `jax.experimental.jet` has no rule, and operations.
   Seen on: jax 0.8.2 to 0.12.
   Cost without: a rematerialized block repeats its sums and collectives.
   Canary: test_barriers.py, `test_jet_knows_names`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from bn_jax.core.xla.primitives import operation


def rounded(x: Array) -> Array:
    """Return x. In half precision, XLA's CPU compiler cannot use the float32 value behind it."""
    return bind_rounded(x)[0] if jnp.finfo(x.dtype).bits < 32 else x


def marked(statistics: Any) -> Any:
    """Numbers per feature, marked as what `save_statistics` saves."""
    return jax.tree.map(lambda numbers: bind_marked(numbers)[0], statistics)


def save_statistics(operation: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint` that saves the statistics of batches.

    Otherwise the backward pass of a rematerialized block repeats their sums and collectives. To
    combine it with another policy, use `jax.checkpoint_policies.save_from_both_policies`.

    >>> import bn_jax as bn
    >>> params, state = bn.init(2)
    >>> block = lambda x: bn.batch_norm(jnp.sin(x), params, state, train=True)
    >>> block = jax.checkpoint(block, policy=bn.save_statistics)
    >>> jax.grad(lambda x: block(x)[0].sum())(jnp.ones((4, 2))).shape
    (4, 2)
    """
    return operation.name == MARK


def same_everywhere(numbers: Array) -> Array:
    """Return constants; XLA's GPU compiler cannot compute them again in several kernels."""
    return bind_same(lax.stop_gradient(numbers))[0]


def downcast(values: Array, dtype: DTypeLike) -> Array:
    """Values in another dtype, rounded to the nearest, ties to even."""
    dtype = jnp.dtype(dtype)
    return values if values.dtype == dtype else bind_downcast(values, dtype=dtype)[0]


def unchanged(x: Array) -> list[Array]:
    """Return x."""
    return [x]


def barrier(x: Array, *, alone: bool) -> list[Array]:
    """Return x, which XLA does not merge with what it was computed from."""
    del alone
    return [lax.optimization_barrier(x)]


def convert(values: Array, *, dtype: jnp.dtype) -> list[Array]:
    """As JAX converts."""
    return [lax.convert_element_type(values, dtype)]


def convert_by_bits(values: Array, *, dtype: jnp.dtype, alone: bool) -> list[Array]:
    """Float32 as bfloat16 by cheap operations: round to 8 bits of precision, drop 16 bits of 0."""
    del alone
    if (values.dtype, dtype) != (jnp.float32, jnp.bfloat16):
        return convert(values, dtype=dtype)
    bits = lax.bitcast_convert_type(lax.reduce_precision(values, 8, 7), jnp.uint32)
    first = lax.convert_element_type(bits >> 16, jnp.uint16)
    return [lax.bitcast_convert_type(first, jnp.bfloat16)]


bind_rounded = operation(
    "rounded",
    unchanged,
    lambda x: [x],
    on={"cpu": barrier},
    jvp=lambda operands, tangents: (bind_rounded(*operands), tangents),
)
MARK = "batch_norm_statistics"
bind_marked = operation(
    MARK,
    unchanged,
    lambda x: [x],
    jvp=lambda operands, tangents: (bind_marked(*operands), tangents),
)
bind_same = operation("same_everywhere", unchanged, lambda x: [x], on={"all": barrier})
bind_downcast = operation(
    "downcast",
    convert,
    lambda values, *, dtype: [values.update(dtype=dtype, weak_type=False)],
    on={"cpu": convert_by_bits},
    jvp=lambda operands, tangents, *, dtype: (
        bind_downcast(*operands, dtype=dtype),
        [None if dot is None else lax.convert_element_type(dot, dtype) for dot in tangents],
    ),
)
