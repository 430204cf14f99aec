"""Plots of benchmark results."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bn_jax.bench.layer import COPY
from bn_jax.bench.peers import OURS
from bn_jax.bench.report import Report

DASHED = ("flax", "flax accurate")
TITLES = {
    "var": "variance, relative",
    "y": "output, absolute",
    "dx": "gradient of x, relative",
}


def save_plots(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Save a plot for each suite that has one."""
    draw = {"layer": layer_figure, "accuracy": accuracy_figure}
    paths = []
    for report in reports:
        if report.suite in draw:
            path = folder / f"{report.suite}.png"
            draw[report.suite](report.rows).savefig(path, dpi=150)
            paths.append(path)
    return paths


def layer_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Bars of each peer's time as a multiple of ours, by shape, with a panel per dtype."""
    steps = [r for r in rows if r["what"] == "step" and r["contender"] not in (COPY, OURS)]
    dtypes = list(dict.fromkeys(r["dtype"] for r in steps))
    names = list(dict.fromkeys(r["contender"] for r in steps))
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in steps))
    figure = Figure(figsize=(9, 3.2 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), squeeze=False)[:, 0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        for place, name in enumerate(names):
            chosen = [r for r in steps if (r["dtype"], r["contender"]) == (dtype, name)]
            width = 0.8 / len(names)
            positions = [n + (place - len(names) / 2 + 0.5) * width for n in range(len(chosen))]
            ratios = [r["ratio"] for r in chosen]
            errors = [
                [r["ratio"] - r["quartiles"][0] for r in chosen],
                [r["quartiles"][1] - r["ratio"] for r in chosen],
            ]
            errors = [[max(0, e) for e in side] for side in errors]
            panel.bar(positions, ratios, width, yerr=errors, label=name, color=f"C{place + 1}")
        panel.axhline(1, color="C0", linewidth=2, label=OURS)
        panel.set_xticks(range(len(shapes)), ["×".join(map(str, shape)) for shape in shapes])
        panel.set_ylabel(f"times as long as {OURS}")
        panel.set_title(f"Forward and backward, {dtype} (error bars: quartiles)")
    panels[0].legend(ncols=4, fontsize=8)
    return figure


def accuracy_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Error against mean/std: a panel per quantity, a line per layer, and our target dotted.

    flax's lines are dashed, so that the lines they cover can be seen.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(TITLES))
    names = list(dict.fromkeys(r["contender"] for r in rows if r["contender"] != "nnx"))  # as flax
    for panel, (quantity, title) in zip(panels, TITLES.items(), strict=True):
        for place, name in enumerate(names):
            chosen = [r for r in rows if (r["quantity"], r["contender"]) == (quantity, name)]
            drawn = [r for r in chosen if math.isfinite(r["error"])]
            panel.plot(
                [max(r["offset"], 0.1) for r in drawn],
                [max(r["error"], 1e-9) for r in drawn],
                marker="o",
                markersize=4,
                linestyle="--" if name in DASHED else "-",
                color=f"C{place}",
                linewidth=3.5 if name == OURS else 1.5,
                zorder=3 if name in DASHED else 2,
                label=name,
            )
            if name == OURS:
                offsets = [max(r["offset"], 0.1) for r in chosen]
                bars = [r["bar"] for r in chosen]
                panel.plot(offsets, bars, "k:", linewidth=1.5, label="our target")
        panel.set_xscale("log")
        panel.set_xticks([0.1, 1, 1e2, 1e4], ["0", "1", "10²", "10⁴"])
        panel.set_yscale("log")
        panel.set_xlabel("mean of x / standard deviation")
        panel.set_title(title)
    panels[0].set_ylabel("worst error against float64")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure
