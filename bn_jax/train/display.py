"""What a person sees of a run: progress while it lasts, a table and a plot at its end."""

import io
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.flags import dashed
from bn_jax.train.loop import Activity, Evaluation
from bn_jax.train.summary import FINAL, LEVELS, Row, diverged_seeds, estimate

TITLES: dict[Arm, str] = {"batch": "with batch norm", "none": "without"}
NETWORKS: dict[Arm, str] = {
    "batch": "the network with batch norm",
    "none": "the network without batch norm",
}
"""The arms as a message names them, where no other title stands beside it."""
COLORS: dict[Arm, str] = {"batch": "tab:blue", "none": "tab:orange"}


@contextmanager
def progress_bars(console: Console, config: TrainConfig) -> Iterator[dict[Arm, "Bar"]]:
    """A live bar per arm: step, loss and test accuracy or what is being done, time left."""
    with Progress(
        TextColumn("{task.description:>15}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bar]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as progress:
        yield {arm: Bar(progress, TITLES[arm], config.steps) for arm in config.arms}


class Bar:
    """The bar of one arm; as text, loss and accuracy, or what is being done."""

    def __init__(self, progress: Progress, title: str, steps: int) -> None:
        self.progress, self.activity, self.since = progress, None, 0.0
        self.known = "loss   –     accuracy   –  "  # as wide as with figures
        self.task = progress.add_task(title, start=False, total=steps, bar=self)

    def __str__(self) -> str:
        seconds = int(time.monotonic() - self.since)
        # Whatever else takes less than a second would flicker.
        if self.activity == "compiling" or (self.activity and seconds):
            return f"{self.activity}, {seconds} s".ljust(len(self.known))
        return self.known

    def watch(self, activity: Activity | None, step: int) -> None:
        """Show what begins now, after how many steps; None where all is over."""
        self.activity, self.since = activity, time.monotonic()
        self.progress.start_task(self.task)  # which does nothing the second time
        self.progress.update(self.task, completed=step)

    def show(self, evaluations: Sequence[Evaluation]) -> None:
        """Show the medians of some evaluations; before the first step there is no loss."""
        accuracy = statistics.median(e.test_accuracy for e in evaluations)
        loss = statistics.median(e.train_loss for e in evaluations)
        figure = f"{loss:.4f}" if loss < 100 else f"{loss:.0e} "
        shown = figure if evaluations[0].step else "  –   "
        self.known = f"loss {shown}  accuracy {accuracy:.4f}"


def describe(config: TrainConfig) -> str:
    """What was trained, in a few words."""
    return f"{config.dataset}, {config.model}: {config.steps:,} steps of {config.batch_size}" + (
        f", {config.seeds} seeds: mean ± 95% interval" if config.seeds > 1 else ""
    )


def comparison_table(summary: Row, config: TrainConfig) -> Table:
    """The arms side by side."""
    table = Table(title=f"Test accuracy on {describe(config)}", title_justify="left")
    table.add_column("", no_wrap=True)
    any_bad = any(row["bad_steps"] for row in summary["arms"].values())
    levels = [f"steps to {level:.2f}" for level in LEVELS]
    for heading in ("accuracy", *["bad steps"] * any_bad, *levels, "steps/s"):
        table.add_column(heading, justify="right", min_width=8)
    for arm, row in summary["arms"].items():
        half = row.get("plus_or_minus", {FINAL: None, "steps_to": {}})
        accuracy = accuracy_cell(row[FINAL], half[FINAL], diverged_seeds(row), config)
        bad = [f"{row['bad_steps']:,}"] * any_bad
        steps = [cell(n, half["steps_to"].get(level)) for level, n in row["steps_to"].items()]
        rate = row["examples_per_second"]
        speed = f"{rate / config.batch_size:,.0f}" if rate else "–"
        table.add_row(TITLES[arm], accuracy, *bad, *steps, speed)
    if ratios := summary.get("steps_without_over_with"):
        shown = [f"{ratio:.1f}×" if ratio else "–" for ratio in ratios.values()]
        table.add_row("without ÷ with", "", *[""] * any_bad, *shown, "", style="dim")
    return table


def grid_table(rows: Sequence[Row], config: TrainConfig) -> Table:
    """A row per combination with the accuracy of each arm; the best are bold."""
    title = f"Test accuracy on {describe(config)}"
    table = Table(*map(dashed, config.axes), title=title, title_justify="left")
    columns = [[row for row in rows if row["arm"] == arm] for arm in config.arms]
    best = {arm: max(row[FINAL] for row in rows if row["arm"] == arm) for arm in config.arms}
    for arm in config.arms:
        table.add_column(TITLES[arm], justify="right")

    def text(row: Row) -> str:
        half = row[f"{FINAL}_plus_or_minus"]
        shown = accuracy_cell(row[FINAL], half, row["diverged"], config)
        return f"[bold]{shown}[/bold]" if row[FINAL] == best[row["arm"]] else shown

    for same in zip(*columns, strict=True):
        table.add_row(*(f"{same[0][name]:g}" for name in config.axes), *map(text, same))
    return table


def cell(mean: float | None, half: float | None, form: str = ",.0f") -> str:
    """A number of the table, with half of its interval where there is one."""
    if mean is None:
        return "–"
    return f"{mean:{form}}" + (f"\n± {half:{form}}" if half is not None else "")


def accuracy_cell(mean: float, half: float | None, diverged: int, config: TrainConfig) -> str:
    """An accuracy for the table, with the number of seeds that diverged."""
    if diverged == config.seeds:
        return "diverged"
    return cell(mean, half, ".4f") + f"\n{diverged} of {config.seeds} diverged" * bool(diverged)


def plot_curves(arms: Mapping[Arm, Sequence[Evaluation]], config: TrainConfig) -> bytes:
    """Test accuracy and training loss over steps, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for arm, evaluations in arms.items():
        style = {"label": TITLES[arm], "color": COLORS[arm]}
        sound = [e for e in evaluations if not e.diverged]
        draw(accuracy, [(e.step, e.test_accuracy) for e in sound], **style)
        draw(loss, [(e.step, e.train_loss) for e in sound if e.step], **style)
    if config.is_papers:
        text = resources.files("bn_jax.train").joinpath("figure_1a.json").read_text()
        for arm in arms:
            points = [point for point in json.loads(text)[arm] if point[0] <= config.steps]
            style = {"label": f"{TITLES[arm]}, in the paper", "color": COLORS[arm]}
            accuracy.plot(*zip(*points, strict=True), linestyle=":", zorder=1, **style)
    finals = [e[-1].test_accuracy for e in arms.values()]
    # As in the paper's Figure 1(a): the interesting part is near the top.
    accuracy.set(xlabel="step", ylabel="test accuracy", ylim=(0.7 if max(finals) > 0.9 else 0, 1))
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    title = f"{config.dataset}, {config.model}, {config.optimizer} at {config.learning_rate:g}, "
    title += f"batches of {config.batch_size}"
    title += f"; mean of {config.seeds} seeds, 95% interval" if config.seeds > 1 else ""
    return to_png(figure, title)


def draw(axes: Axes, points: Sequence[tuple[int, float]], color: str, label: str) -> None:
    """Plot the mean of the values of each step, with a band for their 95% interval."""
    values: dict[int, list[float]] = {}
    for step, value in points:
        values.setdefault(step, []).append(value)
    estimates = [estimate(some) for some in values.values()]
    means = np.array([mean for mean, _ in estimates], float)
    halves = np.array([half or 0 for _, half in estimates])
    axes.plot(list(values), means, color=color, label=label)
    if halves.any():
        band = means - halves, means + halves
        axes.fill_between(list(values), *band, color=color, alpha=0.25, linewidth=0)


def plot_grid(rows: Sequence[Row], config: TrainConfig) -> bytes:
    """A panel per axis: the final accuracy at each value, with the best of the other values."""
    figure = Figure(figsize=(5 * len(config.axes), 4), layout="constrained")
    panels = figure.subplots(1, len(config.axes), squeeze=False)[0]
    for axes, (name, values) in zip(panels, config.axes.items(), strict=True):
        for arm in config.arms:
            ascending = sorted(rows, key=lambda row: row[FINAL])
            best = {row[name]: row for row in ascending if row["arm"] == arm}
            shown = [best[value] for value in sorted(values)]
            halves = [row[f"{FINAL}_plus_or_minus"] or 0 for row in shown]
            style: Any = {"color": COLORS[arm], "label": TITLES[arm], "marker": "o", "capsize": 3}
            axes.errorbar(sorted(values), [row[FINAL] for row in shown], halves, **style)
        axes.set(xlabel=dashed(name), ylabel="test accuracy at the end")
        if min(values) > 0:
            axes.set_xscale("log")
    note = "" if len(config.axes) == 1 else "; each at the best of the other values"
    return to_png(figure, f"{config.dataset}, {config.model}, {config.steps:,} steps{note}")


def to_png(figure: Figure, title: str) -> bytes:
    """A figure of labelled lines, with grid, legends and title, as the content of a file."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
