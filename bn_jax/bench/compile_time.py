"""How long a layer, and a stack of twenty, take to be traced, lowered and compiled.

Run it with: bn-jax bench --suite compile

Last results, 2026-11-24, 2 cores of an AMD EPYC, jax 0.10.2, flax 0.12.8, times flax's for a layer
and for a stack of twenty: 1.29 and 1.41 (249 ms and 1.7 s); since the derivative is traced once for
all layers of a shape, 1.24 and 1.47, 1.18 and 1.39 (224 ms and 1.4 s); of today's program, on a
machine that was busy, 1.42 and 1.36. In the stack, tracing fell from 710 to 410 ms then (flax's:
320). The rest is XLA's: 22 kernels per layer to flax's 20, of twice as many operations. The bare
formula, without guards for empty batches, constant features and bad moments, compiles as fast as
flax's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from bn_jax.bench.contender import training_step
from bn_jax.bench.interleave import Timing, interleave
from bn_jax.bench.peers import FUNCTIONAL, OURS
from bn_jax.bench.report import Bar, Report
from bn_jax.bench.stack import make_stack

SHAPE = (8, 16, 16, 16)


def run(
    peers: Sequence[str], *, turns: int = 15, shape: tuple[int, ...] = SHAPE, depth: int = 20
) -> Report:
    """Time all JAX layers whose features are last; the stack in a third of the turns."""
    names = [name for name in peers if name in FUNCTIONAL and name != "equinox"]
    timings = {
        "layer": interleave(
            {name: layer_compiler(name, shape) for name in names}, reference=OURS, turns=turns
        ),
        f"stack of {depth}": interleave(
            {name: stack_compiler(name, shape, depth) for name in names},
            reference=OURS,
            turns=max(2, turns // 3),
        ),
    }
    rows = [
        {
            "what": what,
            "contender": name,
            "milliseconds": timing.median * 1e3,
            "ratio": timing.ratio,
            "quartiles": list(timing.spread),
        }
        for what, found in timings.items()
        for name, timing in found.items()
    ]
    return Report("compile", rows, [table(timings)], bars(rows))


def layer_compiler(name: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """A function that compiles a layer's step anew."""
    layer = FUNCTIONAL[name](shape, 0.99)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run() -> object:
        jax.clear_caches()
        step = training_step(layer.apply)
        return jax.jit(step).lower(layer.params, layer.state, x, x).compile()

    return run


def stack_compiler(name: str, shape: tuple[int, ...], depth: int) -> Callable[[], object]:
    """A function that compiles a stack's gradient anew."""
    params, state, loss = make_stack(name, shape, depth)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run() -> object:
        jax.clear_caches()
        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, state, x).compile()

    return run


def table(timings: dict[str, dict[str, Timing]]) -> Table:
    """Layers down."""
    result = Table(
        title="Tracing, lowering and compiling in ms; in brackets, how many times ours",
        title_justify="left",
    )
    result.add_column("")
    for what in timings:
        result.add_column(what, justify="right")
    for name in next(iter(timings.values())):
        cells = [
            f"{found[name].median * 1e3:,.0f} ({found[name].ratio:.2f})"
            for found in timings.values()
        ]
        result.add_row(name, *cells)
    return result


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """At most 1.1 times flax's."""
    return [
        Bar(f"{r['what']}, {OURS} / flax", 1 / r["ratio"], 1.1, at_least=False)
        for r in rows
        if r["contender"] == "flax"
    ]
