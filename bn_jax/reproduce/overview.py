"""All claims in one figure: a square per check, full where it holds."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bn_jax.reproduce.claim import Check, Claim, verdict

STYLES: dict[str, dict[str, Any]] = {
    "holds": {"facecolor": "tab:blue", "edgecolor": "black"},
    "undecided": {"facecolor": "white", "edgecolor": "black", "hatch": "////"},
    "does not hold": {"facecolor": "white", "edgecolor": "black"},
}


def draw_overview(claims: Sequence[Claim], checks: Sequence[Sequence[Check]]) -> Figure:
    """A row per claim: its title, its checks, and the verdict.

    Args:
        claims: from top to bottom.
        checks: of each.
    """
    figure = Figure(figsize=(9, 0.7 + 0.34 * len(claims)), layout="constrained")
    axes = figure.subplots()
    most = max(map(len, checks))
    for row, some in enumerate(checks):
        for column, check in enumerate(some):
            axes.bar(column, 0.62, 0.62, row - 0.31, **STYLES[check.outcome])
        axes.text(most - 0.2, row, verdict(some), va="center")
    axes.set_yticks(range(len(claims)), [claim.title for claim in claims])
    axes.set(xlim=(-0.7, most + 2.2), ylim=(len(claims) - 0.4, -0.6), xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    handles = [Patch(label=outcome, **style) for outcome, style in STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure
