"""What a grid of runs leaves: a row per combination of values, and how each value matters."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from bn_jax.train.config import Arm, TrainConfig, dashed
from bn_jax.train.display import COLORS, TITLES, accuracy_cell, png
from bn_jax.train.loop import Evaluation
from bn_jax.train.summary import summarize_arm

Row = dict[str, Any]
FINAL = "final_test_accuracy"


def grid_rows(arms: Mapping[Arm, Sequence[Evaluation]], config: TrainConfig) -> list[Row]:
    """A flat row per arm and combination of values, as in `sweep.csv`."""
    rows: list[Row] = []
    for arm, evaluations in arms.items():
        for number, values in enumerate(config.grid):
            row = summarize_arm([e for e in evaluations if e.cell == number])
            levels = row.pop("steps_to")
            lost = sum(seed["diverged"] for seed in row.pop("seeds", {"": row}).values())
            half = row.pop("plus_or_minus", {FINAL: None})[FINAL]
            rows.append(
                {
                    "arm": arm,
                    **values,
                    "seeds": config.seeds,
                    **row,
                    "diverged": lost,
                    f"{FINAL}_plus_or_minus": half,
                    **{f"steps_to_{level}": steps for level, steps in levels.items()},
                }
            )
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json_lines(rows: Sequence[Row]) -> str:
    """The rows as JSON, one a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def grid_table(rows: Sequence[Row], config: TrainConfig) -> Table:
    """A table of accuracies, with a row per combination and a column per arm; the best are bold."""
    what = f"{config.dataset}, {config.model}: {config.steps:,} steps of {config.batch_size}"
    what += f", {config.seeds} seeds" if config.seeds > 1 else ""
    table = Table(*map(dashed, config.axes), title=f"Test accuracy on {what}", title_justify="left")
    best = {arm: max((r[FINAL] for r in rows if r["arm"] == arm), default=0) for arm in config.arms}
    for arm in config.arms:
        table.add_column(TITLES[arm], justify="right")
    cells: dict[tuple[float, ...], list[str]] = {}
    for row in rows:
        text = accuracy_cell(row[FINAL], row[f"{FINAL}_plus_or_minus"], row["diverged"], config)
        text = f"[bold]{text}[/bold]" if row[FINAL] == best[row["arm"]] else text
        cells.setdefault(tuple(row[name] for name in config.axes), []).append(text)
    for values, texts in cells.items():
        table.add_row(*(f"{value:g}" for value in values), *texts)
    return table


def plot_grid(rows: Sequence[Row], config: TrainConfig) -> bytes:
    """A panel per axis: the final accuracy at each value, with the best of the other values."""
    figure = Figure(figsize=(5 * len(config.axes), 4), layout="constrained")
    panels = figure.subplots(1, len(config.axes), squeeze=False)[0]
    for axes, (name, values) in zip(panels, config.axes.items(), strict=True):
        for arm in config.arms:
            best = [
                max(
                    (r for r in rows if (r["arm"], r[name]) == (arm, value)), key=lambda r: r[FINAL]
                )
                for value in sorted(values)
            ]
            halves = [row[f"{FINAL}_plus_or_minus"] or 0 for row in best]
            style = {"color": COLORS[arm], "label": TITLES[arm], "marker": "o", "capsize": 3}
            axes.errorbar(sorted(values), [row[FINAL] for row in best], halves, **style)
        if min(values) > 0:
            axes.set_xscale("log")
        axes.set(xlabel=dashed(name), ylabel="test accuracy at the end")
        axes.grid(alpha=0.3)
        axes.legend()
    note = "" if len(config.axes) == 1 else "; each at the best of the other values"
    figure.suptitle(f"{config.dataset}, {config.model}, {config.steps:,} steps{note}")
    return png(figure)
