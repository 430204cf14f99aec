"""What a layer keeps for its backward pass, and what that makes of a stack of twenty.

Residuals are what `jax.vjp` holds; a stack's memory is XLA's own account of the temporary buffers
of one compiled gradient (convolution, batch norm, ReLU, twenty times).

Run it with: bn-jax bench --suite memory

Last result, 2026-11-27, jax 0.10.2 and flax 0.12.8 on a CPU: residuals of x's own size, 0.50 of
flax's in float32 and 0.25 in bfloat16; buffers of a stack of twenty 0.68 and 0.52 of flax's. In
bfloat16 a layer of the stack keeps three times x: x itself, and the ReLU's result in float32, since
the CPU convolves in float32; flax's keeps six. Without `core/rounded.py`, and with it before
jaxlib 0.10, the y whose sign the ReLU's derivative asks for is a fourth (0.67); without
`core/stored.py` a wide x would be a fifth. What keeps 3 : 6 from being 0.50 are the convolutions'
own buffers at the peak, 5.7 times x in both. The rounding by bits costs a step nothing (0.98 to
1.02 of the time with a conversion, at five shapes).

On an NVIDIA H100, 2026-11-27, jax 0.11.2 and flax 0.12.10: residuals 0.50 and 0.25 of flax's, the
stack 1.09 and 0.95. There XLA keeps neither what flax would like to keep: x and the ReLU's result
are left of a layer, whoever normalizes. Of ours in float32 it also writes down where the ReLU was
positive, a byte per value, instead of computing that again; with flax's it writes and reads one
more array per layer instead, the gradient behind the ReLU. At (128, 56, 56, 64) it keeps the bytes
for all in float32: 1.00 in both types. A step of that stack takes flax 1.01 times as long as ours
in float32 and 1.06 in bfloat16, its accurate mode 1.09 and 1.15; of the stack measured here, where
launches take most of the time, 0.95 and 0.96.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from bn_jax.bench.peers import FUNCTIONAL, OURS
from bn_jax.bench.report import Bar, Report
from bn_jax.bench.stack import make_stack

SHAPE = (32, 32, 32, 64)
DTYPES = ("float32", "bfloat16")


def run(
    peers: Sequence[str],
    *,
    shape: tuple[int, ...] = SHAPE,
    depth: int = 20,
    dtypes: Sequence[str] = DTYPES,
) -> Report:
    """The bytes of each JAX layer whose features are last."""
    rows = [
        {
            "dtype": dtype,
            "contender": name,
            "residuals": residuals(name, shape, dtype),
            "stack": stack_memory(name, shape, depth, dtype),
            "input": math.prod(shape) * jnp.dtype(dtype).itemsize,
        }
        for dtype in dtypes
        for name in peers
        if name in FUNCTIONAL and name != "equinox"
    ]
    return Report("memory", rows, [table(rows, shape, depth)], bars(rows))


def residuals(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Bytes that one layer keeps between its forward and its backward pass."""
    layer = FUNCTIONAL[name](shape, 0.99)

    def pullback(params: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda p, x: layer.apply(p, layer.state, x, True)[0], params, x)[1]

    kept = jax.eval_shape(pullback, layer.params, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(kept))


def stack_memory(name: str, shape: tuple[int, ...], depth: int, dtype: str) -> int:
    """Bytes of temporary buffers of the gradient of a stack."""
    params, state, loss = make_stack(name, shape, depth)
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    analysis: Any = gradient.lower(params, state, x).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def table(rows: Sequence[dict[str, Any]], shape: tuple[int, ...], depth: int) -> Table:
    """Megabytes."""
    result = Table(
        title=f"Memory in MB, x of shape {shape}; in brackets, in multiples of x",
        title_justify="left",
    )
    for heading in ("dtype", "", "residuals of a layer", f"buffers of a stack of {depth}"):
        result.add_column(heading, justify="left" if heading in ("dtype", "") else "right")
    for r in rows:
        cells = [
            f"{r[key] / 1e6:,.1f} ({r[key] / r['input']:.1f})" for key in ("residuals", "stack")
        ]
        result.add_row(r["dtype"], r["contender"], *cells)
    return result


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """At most half of flax's for bfloat16, less than flax's for float32."""
    found = {(r["dtype"], r["contender"]): r for r in rows}
    result = []
    for dtype, bound in {"bfloat16": 0.5, "float32": 0.999}.items():
        if (dtype, "flax") in found:
            for what in ("residuals", "stack"):
                value = found[dtype, OURS][what] / found[dtype, "flax"][what]
                result.append(Bar(f"{what}, {dtype}, {OURS} / flax", value, bound, False))
    return result
