"""The memory that a layer keeps for its backward pass, and that a stack of twenty layers needs.

A layer's memory is that of the residuals in `jax.vjp`. A stack's memory is XLA's own count of the
temporary buffers in one compiled gradient (convolution, batch norm, ReLU, twenty times).

Run it with: bn-jax bench --suite memory. Results are in RESULTS.md.
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
    """Measure the bytes of each JAX layer with features last."""
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
    """The bytes that one layer keeps between its forward and its backward pass."""
    layer = FUNCTIONAL[name](shape, 0.99)

    def pullback(params: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda p, x: layer.apply(p, layer.state, x, True)[0], params, x)[1]

    kept = jax.eval_shape(pullback, layer.params, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(kept))


def stack_memory(name: str, shape: tuple[int, ...], depth: int, dtype: str) -> int:
    """The bytes of temporary buffers in a stack's gradient."""
    params, state, loss = make_stack(name, shape, depth)
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    analysis: Any = gradient.lower(params, state, x).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def table(rows: Sequence[dict[str, Any]], shape: tuple[int, ...], depth: int) -> Table:
    """A table of megabytes, with a row per dtype and layer."""
    result = Table(
        title=f"Memory in MB for x of shape {shape}; in brackets, in multiples of x",
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
    """Bars: at most half of flax's memory in bfloat16, and less than flax's in float32."""
    found = {(r["dtype"], r["contender"]): r for r in rows}
    result = []
    for dtype, bound in {"bfloat16": 0.5, "float32": 0.999}.items():
        if (dtype, "flax") in found:
            for what in ("residuals", "stack"):
                value = found[dtype, OURS][what] / found[dtype, "flax"][what]
                result.append(Bar(f"{what}, {dtype}, {OURS} / flax", value, bound, False))
    return result
