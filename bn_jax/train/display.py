"""What a person sees of a run: progress while it lasts, a table and a plot at its end."""

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.loop import Evaluation
from bn_jax.train.summary import LEVELS, estimate

TITLES: dict[Arm, str] = {"batch": "with batch norm", "none": "without"}
COLORS: dict[Arm, str] = {"batch": "tab:blue", "none": "tab:orange"}


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """A live bar per arm: step, loss and test accuracy or what is being done, time left."""
    with Progress(
        TextColumn("{task.description:>15}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        StatusColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as progress:
        yield progress


class StatusColumn(ProgressColumn):
    """Loss and accuracy; or what is being done, if that takes more than a second."""

    def render(self, task: Task) -> Text:
        """The column's text; the task's field `activity` is (what, since when), or None."""
        known = "loss {loss}  accuracy {accuracy}".format(**task.fields)
        activity, since = task.fields["activity"] or (None, 0.0)
        seconds = int(time.monotonic() - since)
        if activity == "compiling" or (activity and seconds):
            return Text(f"{activity}, {seconds} s".ljust(len(known)))
        return Text(known)


def comparison_table(summary: dict[str, Any], config: TrainConfig) -> Table:
    """The arms side by side."""
    what = f"{config.dataset}, {config.model}: {config.steps:,} steps of {config.batch_size}"
    if config.seeds > 1:
        what += f", {config.seeds} seeds: mean ± 95% interval"
    table = Table(title=f"Test accuracy on {what}", title_justify="left")
    table.add_column("", no_wrap=True)
    any_bad = any(row["bad_steps"] for row in summary["arms"].values())
    levels = [f"steps to {level:.2f}" for level in LEVELS]
    headings = ["accuracy", *["bad steps"] * any_bad, *levels, "steps/s"]
    for heading in headings:
        table.add_column(heading, justify="right", min_width=8)
    for arm, row in summary["arms"].items():
        half = row.get("plus_or_minus", {"final_test_accuracy": None, "steps_to": {}})
        steps = [cell(n, half["steps_to"].get(level)) for level, n in row["steps_to"].items()]
        rate = row["examples_per_second"]
        speed = f"{rate / config.batch_size:,.0f}" if rate else "–"
        lost = sum(seed["diverged"] for seed in row.get("seeds", {"": row}).values())
        final = row["final_test_accuracy"], half["final_test_accuracy"]
        accuracy = accuracy_cell(*final, lost, config)
        bad = [f"{row['bad_steps']:,}"] if any_bad else []
        table.add_row(TITLES[arm], accuracy, *bad, *steps, speed)
    ratios = summary.get("steps_without_over_with")
    if ratios:
        ratio = [f"{r:.1f}×" if r else "–" for r in ratios.values()]
        table.add_row("without ÷ with", "", *[""] * any_bad, *ratio, "", style="dim")
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


def draw(axes: Axes, points: Sequence[tuple[int, float]], color: str, label: str) -> None:
    """Plot the mean of the values of each step, with a band for their 95% interval."""
    values: dict[int, list[float]] = {}
    for step, value in points:
        values.setdefault(step, []).append(value)
    steps, estimates = list(values), [estimate(some) for some in values.values()]
    means = np.array([mean for mean, _ in estimates], float)
    halves = np.array([half or 0 for _, half in estimates])
    axes.plot(steps, means, color=color, label=label)
    if halves.any():
        low, high = means - halves, means + halves
        axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)


def plot_curves(arms: Mapping[Arm, Sequence[Evaluation]], config: TrainConfig) -> bytes:
    """Test accuracy and training loss over steps, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for arm, evaluations in arms.items():
        style = {"label": TITLES[arm], "color": COLORS[arm]}
        draw(accuracy, [(e.step, e.test_accuracy) for e in evaluations if not e.diverged], **style)
        losses = [(e.step, e.train_loss) for e in evaluations if e.step and not e.diverged]
        draw(loss, losses, **style)
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
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"{config.dataset}, {config.model}, {config.optimizer} at {config.learning_rate:g}, "
        f"batches of {config.batch_size}"
        + (f"; mean of {config.seeds} seeds, 95% interval" if config.seeds > 1 else "")
    )
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as the content of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
