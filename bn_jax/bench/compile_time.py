"""How long a layer, and a stack of twenty, take to be traced, lowered and compiled.

Run it with: bn-jax bench --suite compile

Last results, 2026-11-26, 2 cores of an AMD EPYC (on a day when it was half as fast as at its best),
jax 0.10.2, flax 0.12.8: 1.48 times flax's time for a layer (418 ms), 1.27 times for a stack of
twenty (2.6 s). Before y was made from sums, and counts were known where nothing is masked, 1.61 and
1.46 the same day. Of the stack, tracing takes 1.3 times flax's time, lowering 1.5, XLA 1.3.
On an NVIDIA H100, 2026-11-27, jax 0.11.2, flax 0.12.10: 1.37 times for a layer (293 ms), 1.31 times
for the stack (2.4 s).

Where it goes: a kernel takes XLA about 10 ms, one with expm1 27, with tanh 16. A layer has 18 (21
before), flax's 15, of which 5 are calls into a library. What was tried besides: quotients behind a
barrier instead of guarded, no gain; unguarded where the count is a power of two, 5% of a layer and
nothing of a stack; 1/√∞ for a feature without spread, which saves a selection, but of 16 features
LLVM then unrolls the whole loop that makes y, 30% more; the forward pass traced once for all layers
of a shape, as the derivative is, 5% of a stack. None of these is in. Of what the program before
took more than flax's, guards against empty batches, constant features and bad moments were a third,
and the origin another.
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
