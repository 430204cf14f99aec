"""The error of each layer against float64 on the same inputs, and whether ours keeps its bars.

The bars, and how errors are measured, are in `bn_jax.conform.bars`; float32, jitted.

Run it with: bn-jax bench --suite accuracy. Results are in RESULTS.md.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from bn_jax.bench.entries import ENTRIES
from bn_jax.bench.peers import OURS
from bn_jax.bench.report import Bar, Report
from bn_jax.conform import oracle
from bn_jax.conform.bars import QUANTITIES, errors, nominal_bars, normal

OFFSETS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5)
SIZES = ((2, 16), (3, 16), (60, 100), (1021, 16), (200_704, 8))


def run(
    peers: Sequence[str],
    *,
    offsets: Sequence[float] = OFFSETS,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Report:
    """Find each peer's worst error over all sizes, per quantity and offset."""
    rows = []
    for offset in offsets:
        batches = [normal(*size, offset) for size in sizes]
        truths = [oracle.step(x, dy) for x, dy in batches]
        for name in peers:
            found = [
                errors(outcome(ENTRIES[name], x, dy), *truth, dy, offset)
                for (x, dy), truth in zip(batches, truths, strict=True)
            ]
            for quantity in QUANTITIES:
                worst = max(error[quantity] for error in found)
                rows.append(
                    {
                        "quantity": quantity,
                        "offset": offset,
                        "contender": name,
                        "error": worst,
                        "bar": nominal_bars(offset)[quantity],
                    }
                )
    return Report("accuracy", rows, [table(rows)], bars(rows))


def outcome(entry: Any, x: np.ndarray, dy: np.ndarray) -> oracle.Outcome:
    """A training step at γ = 1 and β = 0 of a batch norm that offers its gradient."""
    scale, bias = np.ones(x.shape[-1], np.float32), np.zeros(x.shape[-1], np.float32)
    y, mean, var = entry.batch_norm(x, scale, bias, 1e-5)
    dx, dscale, dbias = entry.gradient(x, scale, bias, 1e-5, dy)
    return oracle.Outcome(y, dx, dscale, dbias, mean, var)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A table with a row per quantity and offset, and a column per contender."""
    names = list(dict.fromkeys(r["contender"] for r in rows))
    result = Table(
        title="Worst error against float64, x ~ N(R, 1); red: above the bar",
        title_justify="left",
        caption="y: absolute; mean: in units of the last place; the others relative. "
        "flax accurate: use_fast_variance=False",
        caption_justify="left",
    )
    for heading in ("", "R", "bar", *names):
        result.add_column(heading, justify="left" if not heading else "right")
    cells: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for quantity in QUANTITIES:
        for r in rows:
            if r["quantity"] == quantity:
                cells.setdefault((quantity, r["offset"]), {})[r["contender"]] = r
    for (quantity, offset), here in cells.items():
        bar = nominal_bars(offset)[quantity]
        texts = [
            f"{r['error']:.1e}" if r["error"] <= bar else f"[red]{r['error']:.1e}[/red]"
            for r in here.values()
        ]
        result.add_row(quantity, f"{offset:g}", f"{bar:g}", *texts)
    return result


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The bars, which only our layer has to keep."""
    return [
        Bar(f"{r['quantity']} at R = {r['offset']:g}", r["error"], r["bar"], at_least=False)
        for r in rows
        if r["contender"] == OURS
    ]
