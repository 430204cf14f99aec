"""What a person sees of a run: progress while it lasts, a table and a plot at its end."""

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
from bn_jax.train.summary import LEVELS

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
    """Loss and accuracy; in their place what is being done, where that takes over a second."""

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
    table = Table(title=f"Test accuracy on {what}", title_justify="left")
    table.add_column("", no_wrap=True)
    any_bad = any(row["bad_steps"] for row in summary["arms"].values())
    levels = [f"steps to {level:.2f}" for level in LEVELS]
    headings = ["accuracy", *["bad steps"] * any_bad, *levels, "steps/s"]
    for heading in headings:
        table.add_column(heading, justify="right", min_width=8)
    for arm, row in summary["arms"].items():
        steps = [f"{n:,}" if n else "–" for n in row["steps_to"].values()]
        rate = row["examples_per_second"]
        speed = f"{rate / config.batch_size:,.0f}" if rate else "–"
        accuracy = "diverged" if row["diverged"] else f"{row['final_test_accuracy']:.4f}"
        bad = [f"{row['bad_steps']:,}"] if any_bad else []
        table.add_row(TITLES[arm], accuracy, *bad, *steps, speed)
    ratios = summary.get("steps_without_over_with")
    if ratios:
        ratio = [f"{r:.1f}×" if r else "–" for r in ratios.values()]
        table.add_row("without ÷ with", "", *[""] * any_bad, *ratio, "", style="dim")
    return table


def plot_curves(arms: Mapping[Arm, Sequence[Evaluation]], config: TrainConfig) -> bytes:
    """Test accuracy and training loss over steps, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for arm, evaluations in arms.items():
        style = {"label": TITLES[arm], "color": COLORS[arm]}
        steps = [e.step for e in evaluations]
        accuracy.plot(steps, [e.test_accuracy for e in evaluations], **style)
        loss.plot(steps[1:], [e.train_loss for e in evaluations[1:]], **style)
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
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
