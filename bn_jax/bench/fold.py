"""What folding saves: a deep convolutional network at inference, with and without batch norms.

Run it with: bn-jax bench --suite fold

XLA fuses an unfolded batch norm with the relu after it, so folding saves the arithmetic and, on a
CPU, whose convolutions are library calls, what of that pass is not the relu's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.table import Table

from bn_jax.bench.interleave import Timing, interleave
from bn_jax.bench.report import Report
from bn_jax.layers.fold import fold_linen
from bn_jax.layers.linen import BatchNorm

FOLDED = "folded"


def run(
    *, turns: int = 15, layers: int = 20, batches: tuple[int, ...] = (1, 32), features: int = 32
) -> Report:
    """Time both on images of 28×28."""
    model, variables = deep_linen(layers, features)
    folded, fewer, _ = fold_linen(model, variables)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        x = jax.random.normal(jax.random.key(1), (batch, 28, 28, features))
        timings = interleave(
            {FOLDED: caller(folded, fewer, x), "unfolded": caller(model, variables, x)},
            reference=FOLDED,
            turns=turns,
            warm=True,
        )
        rows += [row(batch, layers, name, timing) for name, timing in timings.items()]
    return Report("fold", rows, [table(rows)], [])


def deep_linen(layers: int, features: int) -> tuple[nn.Sequential, dict[str, Any]]:
    """Convolutions, each followed by a batch norm and a relu, and their variables."""
    block = lambda: [  # noqa: E731
        nn.Conv(features, (3, 3), use_bias=False),
        BatchNorm(use_running_average=True),
        nn.relu,
    ]
    model = nn.Sequential([layer for _ in range(layers) for layer in block()])
    return model, dict(model.init(jax.random.key(0), jnp.ones((1, 8, 8, features))))


def caller(model: nn.Module, variables: Any, x: jax.Array) -> Any:
    """A call that blocks until its work is done."""
    apply = jax.jit(model.apply)
    return lambda: jax.block_until_ready(apply(variables, x))


def row(batch: int, layers: int, name: str, timing: Timing) -> dict[str, Any]:
    """One figure: the median time, and how many times as long as folded it is."""
    return {
        "batch": batch,
        "layers": layers,
        "contender": name,
        "milliseconds": timing.median * 1e3,
        "ratio": timing.ratio,
        "quartiles": list(timing.spread),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Batches down."""
    result = Table(title="Inference in ms, and in multiples of folded", title_justify="left")
    for name in ("batch", "contender", "ms", "times (quartiles)"):
        result.add_column(name, justify="right")
    for r in rows:
        first, third = r["quartiles"]
        ratio = f"{r['ratio']:.2f} ({first:.2f}–{third:.2f})"
        result.add_row(str(r["batch"]), r["contender"], f"{r['milliseconds']:.2f}", ratio)
    return result
