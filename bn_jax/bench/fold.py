"""What folding saves at inference: a deep convolutional network with and without batch norms.

It times the jitted network, the network without jit, and the compilation.

Run it with: bn-jax bench --suite fold. Results are in RESULTS.md.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.table import Table

from bn_jax.bench.interleave import Timing, interleave
from bn_jax.bench.report import Report
from bn_jax.inference.fold_models import FoldedModule, fold_linen
from bn_jax.layers.linen import BatchNorm

FOLDED = "folded"


def run(*, turns: int = 15, layers: int = 20, batch: int = 1, features: int = 8) -> Report:
    """Time both networks on images of 28×28; only the jitted ones get all turns, others a third."""
    model, variables = deep_linen(layers, features)
    folded, fewer, _ = fold_linen(model, variables)
    x = jax.random.normal(jax.random.key(1), (batch, 28, 28, features))
    rows: list[dict[str, Any]] = []
    for what, caller in {"jitted": jitted, "op by op": op_by_op, "compilation": compiler}.items():
        timings = interleave(
            {FOLDED: caller(folded, fewer, x), "unfolded": caller(model, variables, x)},
            reference=FOLDED,
            turns=turns if what == "jitted" else max(2, turns // 3),
            warm=what == "jitted",
        )
        rows += [row(what, name, timing) for name, timing in timings.items()]
    title = f"Inference of {layers} layers in ms, and in multiples of {FOLDED}"
    return Report("fold", rows, [table(title, rows)], [])


def deep_linen(layers: int, features: int) -> tuple[nn.Sequential, dict[str, Any]]:
    """A network of convolutions, each followed by a batch norm and a relu, with its variables."""
    blocks = [
        (nn.Conv(features, (3, 3), use_bias=False), BatchNorm(use_running_average=True), nn.relu)
        for _ in range(layers)
    ]
    model = nn.Sequential([layer for block in blocks for layer in block])
    return model, dict(model.init(jax.random.key(0), jnp.ones((1, 8, 8, features))))


# Each of these returns a function that blocks until its work is done.


def jitted(model: nn.Module | FoldedModule, variables: Any, x: jax.Array) -> Callable[[], object]:
    """A function that calls the compiled network."""
    apply = jax.jit(model.apply)
    return lambda: jax.block_until_ready(apply(variables, x))


def op_by_op(model: nn.Module | FoldedModule, variables: Any, x: jax.Array) -> Callable[[], object]:
    """A function that calls the network without jit."""
    return lambda: jax.block_until_ready(model.apply(variables, x))


def compiler(model: nn.Module | FoldedModule, variables: Any, x: jax.Array) -> Callable[[], object]:
    """A function that compiles the network from scratch."""

    def run() -> object:
        jax.clear_caches()
        return jax.jit(model.apply).lower(variables, x).compile()

    return run


def row(what: str, name: str, timing: Timing) -> dict[str, Any]:
    """One row: the median time, and its ratio to the folded network's."""
    return {
        "what": what,
        "contender": name,
        "milliseconds": timing.median * 1e3,
        "ratio": timing.ratio,
        "quartiles": list(timing.quartiles),
    }


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """A table with a row per measurement."""
    result = Table(title=title, title_justify="left")
    for name in ("", "contender", "ms", "times (quartiles)"):
        result.add_column(name, justify="right")
    for r in rows:
        first, third = r["quartiles"]
        ratio = f"{r['ratio']:.2f} ({first:.2f}–{third:.2f})"
        result.add_row(r["what"], r["contender"], f"{r['milliseconds']:.2f}", ratio)
    return result
