"""The error of each layer against float64 on the same inputs, and whether ours keeps its bars.

x ~ N(R, 1) per feature, dy ~ N(0, 1), γ = 1, ε = 1e-5, float32, jitted. The bars:

    variance, relative                              1e-6, and 1e-5 at R = 1e5
    y, absolute                                     5e-6, and 1e-5
    dx, relative to max |dx|                        2e-6, and 1e-5
    dγ, dβ, relative to Σ|dy·x̂|, Σ|dy|              2e-6
    mean, in ulp                                    2

Three of the bars cannot be met by any computation in float32 as they stand, and are adjusted:

- dx relative to max |dx|, for m = 2 and 3. dx = γr·P(dy), where P removes the components of dy
  along 1 and x̂. With m = 2, these span everything, and only what ε leaves remains:
  γ r dy ε/(σ² + ε), a difference of terms 10⁵ times as large, so 5 digits are lost. With m = 3,
  one direction is left, and dy can be arbitrarily close to orthogonal to it. So for m < 5 the
  error is taken relative to the size of the terms, γ r (|dy| + |E dy| + |x̂ E[dy·x̂]|).
- 2 ulp of a mean near zero. At best, a mean is the rounded sum of rounded deviations from an
  origin. Its error is u times their size, σ, however small the mean is. So the bar is 2 ulp of
  max(|μ|, σ), which for R ≥ 100 is an ulp of the mean itself.
- 5e-6 for large y. Beyond ten standard deviations, where a normal x never is, y is rounded
  relative to its own size, and the bar is 8 units of roundoff.

Run it with: bn-jax bench --suite accuracy. Results are in RESULTS.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from bn_jax.bench import oracle
from bn_jax.bench.peers import OURS, PEERS
from bn_jax.bench.report import Bar, Report

OFFSETS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5)
SIZES = ((2, 16), (3, 16), (60, 100), (1021, 16), (200_704, 8))
QUANTITIES = ("var", "y", "dx", "dscale", "dbias", "mean")


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
                errors(PEERS[name](x, dy, "float32", 0.0).outcome(), *truth, dy, offset)
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


def normal(
    m: int, features: int, offset: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """X ~ N(offset, 1) and dy ~ N(0, 1), in float32, the same at each call."""
    random = np.random.default_rng([m, features, *[seed] * (seed > 0)])
    x, dy = random.standard_normal((2, m, features))
    return (x + offset).astype(np.float32), dy.astype(np.float32)


def nominal_bars(offset: float) -> dict[str, float]:
    """The bars listed in this module's docstring, at one offset R."""
    near = offset <= 1e4
    return {
        "var": 1e-6 if near else 1e-5,
        "y": 5e-6 if near else 1e-5,
        "dx": 2e-6 if near else 1e-5,
        "dscale": 2e-6,
        "dbias": 2e-6,
        "mean": 2.0,
    }


def errors(
    outcome: oracle.Outcome,
    truth: oracle.Outcome,
    known: oracle.Forward,
    dy: np.ndarray,
    offset: float,
) -> dict[str, float]:
    """The worst error of each quantity, in the unit of its bar; infinite where it is NaN."""
    dy = oracle.wide(dy)
    nominal, std = nominal_bars(offset), np.sqrt(truth.var)
    y_size = np.maximum(1, 8 * oracle.U * np.abs(truth.y) / nominal["y"])
    mean_term, std_term = truth.dbias, known.normalized * truth.dscale
    along = (np.abs(mean_term) + np.abs(std_term)) / np.where(known.count > 0, known.count, 1)
    terms = (known.inverse_std * (np.abs(dy) + along)).max(0)
    dx_size = terms if len(dy) < 5 else np.minimum(terms, np.abs(truth.dx).max(0))
    sizes = {
        "var": truth.var,
        "y": y_size,
        "dx": dx_size,
        "dscale": np.abs(dy * known.normalized).sum(0),
        "dbias": np.abs(dy).sum(0),
        "mean": ulp(np.maximum(np.abs(truth.mean), std)),
    }
    tiny = np.finfo(float).tiny
    result = {}
    for quantity, size in sizes.items():
        error = np.abs(oracle.wide(getattr(outcome, quantity)) - getattr(truth, quantity))
        worst = float((error / np.maximum(size, tiny)).max())
        result[quantity] = math.inf if math.isnan(worst) else worst
    return result


def ulp(x: np.ndarray) -> np.ndarray:
    """The distance between neighbouring float32 numbers at x."""
    return np.spacing(np.asarray(x, np.float32)).astype(np.float64)


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
