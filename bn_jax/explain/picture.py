"""A report as a picture: one line per layer, one panel per network."""

import io
import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bn_jax.explain.report import Report, Row, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST, MOST, MATTERS = 1e-3, 10.0, 0.15
"""The axis of changes in output, in standard deviations, and where a change begins to matter."""

LINE, PLACE = 0.34, 1.9  # inches for a layer, and for the title, axis and legend of a panel


def draw(reports: Mapping[str, Report]) -> "Figure":
    """A figure with a panel for each report, under its name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from error
    scored = any(report.scores for report in reports.values())
    heights = [PLACE + LINE * len(report.rows) for report in reports.values()]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(reports), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (name, report) in zip(parts, reports.items(), strict=True):
        title = f"{name}: {report.summary}" if name else report.summary
        part.suptitle(textwrap.fill(title, 125), fontsize=10, x=0.01, ha="left")
        panels = part.subplots(1, 1 + scored, squeeze=False, width_ratios=[3, 1][: 1 + scored])[0]
        draw_layers(panels[0], report)
        if scored:
            draw_scores(panels[1], report.scores)
    return figure


def draw_layers(axes: "Axes", report: Report) -> None:
    """How far each feature's running statistics are off: a dot, with the layer's mean and noise."""
    for place, row in enumerate(report.rows.values()):
        draw_layer(axes, place, row)
    axes.axvspan(MATTERS, MOST, color="0.92", zorder=0)
    axes.set_xscale("log")
    axes.set(xlim=(LEAST, MOST), ylim=(len(report.rows) - 0.5, -0.5))
    axes.set_yticks(range(len(report.rows)), short(report.rows), fontsize=9)
    axes.set_xlabel("change in the layer's output, in its standard deviations (grey: it matters)")
    shown: dict[str, Any] = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(
        shown.values(),
        shown,
        fontsize=8,
        ncols=len(shown),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
        handletextpad=0.2,
        columnspacing=1,
    )


def draw_layer(axes: "Axes", place: int, row: Row) -> None:
    """One line. What lies outside of the axis is at its end; special features have own marks."""
    features = row.of_features
    usual = features.known & features.finite & ~features.dead & ~features.rare
    change = np.clip(np.nan_to_num(features.change[usual], posinf=MOST), LEAST, MOST)
    # The golden ratio spreads dots evenly over the height of the line, the same in every picture.
    height = place + 0.6 * ((np.arange(len(change)) * 0.618) % 1 - 0.5)
    axes.plot(change, height, ".", color="0.45", ms=5, mew=0, label="a feature")
    if not math.isnan(row.change):
        one = np.clip(np.sqrt(np.mean(features.noise[usual])), LEAST, MOST)
        axes.plot(
            [one] * 2,
            [place - 0.4, place + 0.4],
            "k-",
            lw=1.2,
            label="if statistics were one batch's",
        )
        mean = np.clip(row.change, LEAST, MOST)
        axes.plot(
            mean,
            place,
            "D",
            color="k",
            mfc="w",
            mew=1.6,
            ms=7,
            label="the layer (root mean square)",
        )
    marks = (
        (features.dead, 1.4 * LEAST, "x", "dead"),
        (features.exploding, MOST / 3, "^", "exploding"),
        (~features.finite | ~features.known, MOST / 1.4, "*", "not finite"),
    )
    for which, x, mark, label in marks:
        if count := int(which.sum()):
            axes.plot(x, place, mark, color="k", ms=8, label=label)
            axes.annotate(f"{count}", (x, place), (6, -3), textcoords="offset points", fontsize=8)


def draw_scores(axes: "Axes", scores: Mapping[str, float]) -> None:
    """Accuracies as bars with their numbers."""
    names = list(scores)
    axes.barh(range(len(names)), list(scores.values()), 0.5, color="0.8", edgecolor="k")
    for place, (name, value) in enumerate(scores.items()):
        axes.annotate(f"{name} {value:.4f}", (0.02, place), va="center", fontsize=9)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), yticks=[], xlabel="accuracy")
    axes.set_title("by statistics", fontsize=9, loc="left")


def to_png(figure: "Figure") -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
