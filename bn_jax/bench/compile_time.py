"""The time to trace, lower and compile a layer, and a stack of twenty.

Run it with: bn-jax bench --suite compile. Results, and what was tried to improve them, are in
RESULTS.md.
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
    """Time all JAX layers with features last; the stack gets a third of the turns."""
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
            "quartiles": list(timing.quartiles),
        }
        for what, found in timings.items()
        for name, timing in found.items()
    ]
    return Report("compile", rows, [table(timings)], bars(rows))


def layer_compiler(name: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """A function that compiles a layer's training step from scratch."""
    layer = FUNCTIONAL[name](shape, 0.99)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run() -> object:
        jax.clear_caches()
        step = training_step(layer.apply)
        return jax.jit(step).lower(layer.params, layer.state, x, x).compile()

    return run


def stack_compiler(name: str, shape: tuple[int, ...], depth: int) -> Callable[[], object]:
    """A function that compiles a stack's gradient from scratch."""
    params, state, loss = make_stack(name, shape, depth)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run() -> object:
        jax.clear_caches()
        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, state, x).compile()

    return run


def table(timings: dict[str, dict[str, Timing]]) -> Table:
    """A table with a row per layer."""
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
    """Bars: at most 1.1 times flax's time."""
    return [
        Bar(f"{r['what']}, {OURS} / flax", 1 / r["ratio"], 1.1, at_least=False)
        for r in rows
        if r["contender"] == "flax"
    ]
