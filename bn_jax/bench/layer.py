"""One layer's forward and backward pass, and its inference, against the peers and the memory.

Each contender is one call that returns y, the new state and all gradients. The floor is what a
kernel that only waits for memory would take: 8 traversals of x's size (forward 2 reads and a write,
backward 4 reads and a write) at the speed of a copy measured in the same turns.

Run it with: bn-jax bench --suite layer

Last result, 2026-11-26, 2 cores of an AMD EPYC (on a day when it was half as fast as at its best),
jax 0.10.2, flax 0.12.8, haiku 0.0.17, equinox 0.13.8, torch 2.13.0, 15 turns, geometric means over
the four larger shapes in float32: flax takes 1.53 times as long as ours (1.32 at the least), flax
with use_fast_variance=False 1.99, haiku 1.62, equinox 3.51, torch 1.07. At 64×56×56×64 ours takes
33 ms, 1.02 times the floor; inference takes 1.02 copies. In bfloat16 flax takes 2.74 times as long.
At 60×100 flax takes 0.88 of our 101 µs. A second run, when an origin could still be made of fewer
than 128 values: 1.45 (1.13 at the least), 1.95, 1.50, 3.25, 1.01; floor 0.96, inference 0.93,
bfloat16 2.78. A third, since y is made from sums: 1.65 (1.31 at the least), 2.02, 1.57, 3.29,
0.996; floor 1.03, inference 0.79, bfloat16 2.29. A fourth, on the 27th, since y is rounded by bits:
1.52 (1.31), 1.92, 1.50, 3.19, 0.992; floor 1.02, inference 0.99, bfloat16 2.27. Before
both sums came from one reading of x: 1.15, 1.44, 1.18, 2.49, 0.76; floor 1.16, bfloat16 1.60.

On a GPU, 2026-11-27, one NVIDIA H100, jax 0.11.2, flax 0.12.10, haiku 0.0.17, torch 2.11.0 with
cuDNN, 9 turns of queued calls: at 256×112×112×64 and 256×28×28×512, float32, ours takes 2,023 and
1,014 µs, flax 1.12 times that at both, its accurate mode 1.41 and 1.39, haiku 1.27, torch 1.13 and
1.19; in bfloat16 1,062 and 557 µs, flax 1.43 and 1.42, accurate 1.56 and 1.57, haiku 1.15, torch
2.16 and 1.71. That is 0.87, 0.87, 0.83 and 0.91 of 8 traversals, less than the floor where dy does
not wait for y, since XLA makes y and dx in one loop; in another run of ours alone 0.90, 0.89, 0.89
and 0.93, and in two calls 3.1, 3.2, 3.2 and 3.5 traversals instead of 3 for the forward pass, 4.7,
4.7, 4.6 and 4.7 instead of 5 for the backward. Inference takes 1.01 to 1.03 copies. At 60×100 to
32×14×14×256 every call takes as long as it takes to begin it, 86 to 137 µs for ours, flax 0.81 to
0.99 of that, torch 2.2 to 3.1 times; of kernels, ours is at most one more than flax's.

A Pallas kernel for the sums, through Triton, the best of five tilings: of the time that a copy
takes to read x, forward 1.06 and 1.06 in float32, 1.15 and 1.17 in bfloat16, where XLA's takes
1.03, 1.07, 1.06 and 1.30; backward 1.01 and 1.03, 1.01 and 1.03, where XLA's takes 1.00, 1.00, 1.01
and 1.08. It would save 3% of a step in the last of these four, and nothing in the others, so that
there is none.

What was tried on the CPU. Of the forward sums at 64×56×56×64, where one plain sum takes 3.4 ms: two
reductions of x - origin 12.6 ms; a reduction of both over all of the leading axes 3 to 20 times
that; of both over 14 blocks of the second axis, and plain sums of what is left, 4.2 ms (7 blocks
4.9, of the leading axis 4.3 to 6.1, of the third 5.7); the same written as sums of slices into a
complex array 6.6, or as a complex sum 6.1. More levels of blocks save a tenth of that and double
what the sums take to compile. The backward sums: 11.5 and 7.9 ms. Both sums block by block, so that
the second reads from the cache: 1.6 times slower, as slices are copied first. Per-feature factors
behind a barrier, lest each value compute them again: no difference.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from bn_jax.bench.interleave import Timing, interleave
from bn_jax.bench.peers import OURS, PEERS
from bn_jax.bench.report import Bar, Report

SHAPES = ((60, 100), (1024, 1024), (128, 28, 28, 32), (32, 14, 14, 256), (64, 56, 56, 64))
LARGE = ((256, 112, 112, 64), (256, 28, 28, 512))
"""For GPUs, which are done with the others before the next call can be made."""
DTYPES = ("float32", "bfloat16")
COPY = "copy"
TRAVERSALS = 8


def run(
    peers: Sequence[str],
    *,
    turns: int = 15,
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[str] = DTYPES,
) -> Report:
    """Time all peers at all shapes; None for those of this device."""
    gpu, rows = jax.default_backend() == "gpu", []
    shapes = shapes or (SHAPES + LARGE if gpu else SHAPES)
    for dtype in dtypes:
        for shape in shapes:
            for what, timings in measure(peers, shape, dtype, turns).items():
                rows += [row(what, dtype, shape, name, t) for name, t in timings.items()]
    tables = [table(rows, what, dtype) for what in ("step", "infer") for dtype in dtypes]
    return Report("layer", rows, tables, gpu_bars(rows) if gpu else bars(rows))


def measure(
    peers: Sequence[str], shape: tuple[int, ...], dtype: str, turns: int
) -> dict[str, dict[str, Timing]]:
    """The timings of a step and of inference, per call, of each peer and of a copy."""
    generator = np.random.default_rng(0)
    x, dy = (generator.standard_normal(shape, dtype=np.float32) for _ in range(2))
    layers = {name: PEERS[name](x, dy, dtype) for name in peers}
    batch, negate = jnp.asarray(x).astype(dtype), jax.jit(jnp.negative)
    # Short calls are repeated, so that a turn takes milliseconds; on a GPU ten at the least.
    gpu = jax.default_backend() == "gpu"
    repeats = min(200, max(1, (2**31 if gpu else 2**22) // x.size))
    result = {}
    for what in ("step", "infer"):
        calls = {name: (getattr(layer, what), layer.wait) for name, layer in layers.items()}
        calls[COPY] = (lambda: negate(batch)), jax.block_until_ready
        contenders = {
            name: repeated(call, wait, repeats, queue=gpu) for name, (call, wait) in calls.items()
        }
        timings = interleave(contenders, reference=OURS, turns=turns, warm=True)
        result[what] = {
            name: timing._replace(seconds=[s / repeats for s in timing.seconds])
            for name, timing in timings.items()
        }
    return result


def repeated(
    call: Callable[[], object], wait: Callable[[Any], object], times: int, *, queue: bool
) -> Callable[[], None]:
    """A function that calls some times over.

    It waits for each call's work before the next; or, with a queue, for all at the end: a GPU then
    finds its next work at hand, as in a loop of training steps.
    """

    def run() -> None:
        result = None
        for _ in range(times):
            result = call()
            if not queue:
                wait(result)
        wait(result)

    return run


def row(what: str, dtype: str, shape: tuple[int, ...], name: str, timing: Timing) -> dict[str, Any]:
    """One figure: the median time, and how many times ours it is."""
    first, third = timing.spread
    return {
        "what": what,
        "dtype": dtype,
        "shape": list(shape),
        "contender": name,
        "microseconds": timing.median * 1e6,
        "ratio": timing.ratio,
        "quartiles": [first, third],
    }


def table(rows: Sequence[dict[str, Any]], what: str, dtype: str) -> Table:
    """Contenders down, shapes across: how many times as long as ours, and the quartiles."""
    chosen = [r for r in rows if (r["what"], r["dtype"]) == (what, dtype)]
    title = {"step": "Forward and backward", "infer": "Inference"}[what]
    result = Table(
        title=f"{title}, {dtype}: {OURS} in µs, the others in multiples of it (quartiles)",
        title_justify="left",
    )
    result.add_column("")
    shapes = dict.fromkeys(tuple(r["shape"]) for r in chosen)
    for shape in shapes:
        result.add_column("×".join(map(str, shape)), justify="right")
    for name in dict.fromkeys(r["contender"] for r in chosen):
        cells = [
            f"{r['microseconds']:,.0f}"
            if name == OURS
            else f"{r['ratio']:.2f} ({r['quartiles'][0]:.2f}–{r['quartiles'][1]:.2f})"
            for r in chosen
            if r["contender"] == name
        ]
        result.add_row(name, *cells)
    if what == "step":
        floors = [TRAVERSALS / 2 * r["ratio"] for r in chosen if r["contender"] == COPY]
        result.add_row("floor", *(f"{floor:.2f}" for floor in floors))
    return result


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """What this layer is to reach; of the small shape nothing is asked."""
    ratios: dict[tuple[str, str, str], dict[tuple[int, ...], float]] = {}
    for r in rows:
        if math.prod(r["shape"]) > 10_000:
            key = (r["what"], r["dtype"], r["contender"])
            ratios.setdefault(key, {})[tuple(r["shape"])] = r["ratio"]
    result = []
    for name, bound in {
        "flax": 1.2,
        "flax accurate": 1.4,
        "haiku": 1.4,
        "equinox": 1.4,
        "torch": 1.0,
    }.items():
        if values := ratios.get(("step", "float32", name)):
            what = f"float32, {name} / {OURS}, geometric mean of {len(values)} shapes"
            result.append(Bar(what, geometric_mean(values.values()), bound, True))
    if values := ratios.get(("step", "float32", "flax")):
        result.append(Bar(f"float32, flax / {OURS}, worst shape", min(values.values()), 0.95, True))
    if values := ratios.get(("step", "bfloat16", "flax")):
        what = f"bfloat16, flax / {OURS}, geometric mean of {len(values)} shapes"
        result.append(Bar(what, geometric_mean(values.values()), 1.0, True))
    for what, traversals, bound in (("step", TRAVERSALS, 1.3), ("infer", 2, 1.1)):
        if values := ratios.get((what, "float32", COPY)):
            shape = max(values, key=math.prod)
            name = {"step": "the floor", "infer": "a copy"}[what]
            title = f"float32, {what}, {OURS} / {name}, {shape}"
            result.append(Bar(title, 2 / traversals / values[shape], bound, False))
    return result


def gpu_bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Within 15% of what memory allows, where it is large enough to be what counts."""
    return [
        Bar(
            f"{r['dtype']}, step, {OURS} / the floor, {tuple(r['shape'])}",
            2 / TRAVERSALS / r["ratio"],
            1.15,
            False,
        )
        for r in rows
        if (r["what"], r["contender"]) == ("step", COPY) and tuple(r["shape"]) in LARGE
    ]


def geometric_mean(values: Any) -> float:
    """The mean of ratios."""
    values = list(values)
    return math.prod(values) ** (1 / len(values))
