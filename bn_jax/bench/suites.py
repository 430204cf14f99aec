"""Runs benchmark suites by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console

from bn_jax.bench import accuracy, compile_time, fold, layer, memory, scaling, train_step
from bn_jax.bench.peers import installed
from bn_jax.bench.plots import save_plots
from bn_jax.bench.report import Report, environment, save, show

Suite = Literal["accuracy", "layer", "train-step", "memory", "compile", "scaling", "fold"]
SUITES: tuple[Suite, ...] = get_args(Suite)


def run_suites(
    suites: Sequence[Suite], *, turns: int, data_dir: Path | None, folder: Path, console: Console
) -> bool:
    """Run suites, print and save the results, and return whether our accuracy keeps its bars.

    Only accuracy counts, because the other bars depend on the machine. Each result is saved before
    the next suite begins.
    """
    if not console.is_terminal:
        console.width = max(console.width, 110)  # for files and pipes
    peers = installed()
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    reports: list[Report] = []
    for suite in suites:
        with console.status(f"{suite}: {', '.join(peers)}"):
            reports.append(run_suite(suite, peers, turns, data_dir))
        show(reports[-1], console)
        save(reports, folder)
    plots = save_plots(reports, folder)
    written = " ".join(map(str, (folder / "bench.json", *plots)))
    console.print(f"wrote {written}", soft_wrap=True, markup=False)
    return all(bar.met for report in reports if report.suite == "accuracy" for bar in report.bars)


def run_suite(suite: Suite, peers: Sequence[str], turns: int, data_dir: Path | None) -> Report:
    """Run one suite."""
    if suite == "accuracy":
        return accuracy.run(peers)
    if suite == "layer":
        return layer.run(peers, turns=turns)
    if suite == "train-step":
        return train_step.run(turns=turns, data_dir=data_dir)
    if suite == "memory":
        return memory.run(peers)
    if suite == "scaling":
        return scaling.run()
    if suite == "fold":
        return fold.run(turns=turns)
    return compile_time.run(peers, turns=turns)
