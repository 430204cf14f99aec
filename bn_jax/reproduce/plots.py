"""Lines of the figures: legible in black and white, each method the same everywhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bn_jax.reproduce.intervals import mean_interval

STYLES: dict[str, dict[str, Any]] = {
    "with": {"color": "tab:blue", "linestyle": "-", "marker": "o"},
    "without": {"color": "tab:orange", "linestyle": "--", "marker": "s"},
    "third": {"color": "tab:green", "linestyle": "-.", "marker": "^"},
    "fourth": {"color": "tab:red", "linestyle": ":", "marker": "D"},
    "fifth": {"color": "tab:purple", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
}
"""Of with and without batch norm, and of further methods in their order."""


def line(
    axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, style: str
) -> None:
    """The mean over seeds at each x, in the band of its 95% interval.

    Args:
        axes: to draw on.
        x: where.
        values: at each x, those of the seeds.
        label: of the line.
        style: one of `STYLES`.
    """
    means, lows, highs = np.array([mean_interval(some) for some in values]).T
    options: Any = STYLES[style] | {"markersize": 4, "markevery": max(len(x) // 8, 1)}
    axes.plot(x, means, label=label, **options)
    axes.fill_between(x, lows, highs, color=options["color"], alpha=0.2, linewidth=0)


def finish(axes: Axes, xlabel: str, ylabel: str, title: str = "", **options: Any) -> None:
    """Name the axes, and show the legend where there is one."""
    axes.set(xlabel=xlabel, ylabel=ylabel, **options)
    if title:
        axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")


def rounded(values: Any, digits: int = 5) -> Any:
    """Arrays as lists of short numbers, for JSON; what is not finite becomes None."""
    array = np.asarray(values, float)
    if array.ndim:
        return [rounded(value, digits) for value in array]
    return round(float(array), digits) if np.isfinite(array) else None
