"""The time of one layer: forward and backward, and inference, against peers and a memory floor.

Each contender is one call that returns y, the new state and all gradients. The floor is the time of
a kernel that only waits for memory: 8 traversals of x (2 reads and a write forward, 4 reads and a
write backward) at the speed of a copy that is measured in the same turns.

Run it with: bn-jax bench --suite layer. Results, and what was tried to improve them, are in
RESULTS.md.
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
"""For GPUs, which finish the other shapes before the next call can be launched."""
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
    """Time all peers at all shapes; None takes the shapes for this device."""
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
    """Time a step and an inference of each peer, and a copy of x; times are per call."""
    generator = np.random.default_rng(0)
    x, dy = (generator.standard_normal(shape, dtype=np.float32) for _ in range(2))
    layers = {name: PEERS[name](x, dy, dtype) for name in peers}
    batch, negate = jnp.asarray(x).astype(dtype), jax.jit(jnp.negative)
    # Short calls are repeated, so that a turn takes milliseconds; on a GPU at least ten.
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
    """A function that makes a call several times.

    Without queue, it waits for each call before the next. With queue, it waits only at the end, so
    that a GPU always has work queued, as in a loop of training steps.
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
    """One row: the median time, and its ratio to ours."""
    first, third = timing.quartiles
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
    """A table of ratios to our time, with a row per contender and a column per shape."""
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
    """The bars of this suite on a CPU; the small shape has none."""
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
    """The bars on a GPU: within 15% of the memory floor, at the large shapes."""
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
    """The geometric mean."""
    values = list(values)
    return math.prod(values) ** (1 / len(values))
