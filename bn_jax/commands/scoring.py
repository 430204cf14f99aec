"""`bn-jax evaluate` and `bn-jax explain`: what becomes of a trained run."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.markup import escape

from bn_jax.commands import console
from bn_jax.train.flags import dashed, unset


def evaluate(
    run: tyro.conf.Positional[Path],
    statistics: Annotated[
        Literal["running", "population", "batch"] | None, unset("KIND", "as the run has it")
    ] = None,
    step: Annotated[int | None, unset("N", "the newest")] = None,
    data_dir: Annotated[Path | None, unset("DIR", "where the run had it")] = None,
) -> None:
    """Score a run's newest checkpoints on the test set.

    Args:
        run: The run's folder, e.g. runs/2026-01-31-120000.
        statistics: running, population (200 training batches) or batch: what to normalize by.
        step: The step of the checkpoints to score, if the run kept them (--keep all).
        data_dir: The folder with the data set's files.
    """
    console.quiet_orbax()
    with console.stdout.status("loading JAX") as status:
        from rich.table import Table

        from bn_jax.train.display import TITLES, cell
        from bn_jax.train.evaluation import evaluate_run
        from bn_jax.train.run_folder import RunFolder

        status.update("scoring the test set")
        config = RunFolder(run).read_config()
        rows = evaluate_run(RunFolder(run), data_dir, statistics, step)
    title = f"{run}, {statistics or config.statistics} statistics"
    names = [dashed(name) for name in config.axes]
    table = Table("", *names, "step", "test accuracy", title=title, title_justify="left")
    for row in rows:
        values = (f"{row[name]:g}" for name in config.axes)
        score = cell(row["test_accuracy"], row.get("plus_or_minus"), ".4f").replace("\n", " ")
        table.add_row(TITLES[row["arm"]], *values, f"{row['step']:,}", score)
    console.stdout.print(table)


def explain(
    run: tyro.conf.Positional[Path],
    data_dir: Annotated[Path | None, unset("PATH", "where the run had it")] = None,
) -> None:
    """Say why a run's networks score worse in evaluation than in training.

    - Prints, for each network with batch norm, how far the running statistics of
      each layer are from the training images', the test accuracy by running,
      population and batch statistics, what is wrong, and a remedy.
    - Leaves explain.png in the run's folder.

    Args:
        run: The run's folder, e.g. runs/2026-01-31-120000.
        data_dir: The folder with the data set's files.
    """
    console.quiet_orbax()
    with console.stdout.status("loading JAX") as status:
        from bn_jax.train.evaluation import PICTURE, explain_run
        from bn_jax.train.run_folder import RunFolder

        status.update("comparing statistics")
        for name, report in explain_run(RunFolder(run), data_dir):
            text = str(report).replace("RUN", shlex.quote(str(run)))
            print(f"{name}\n\n{text}\n")
    console.stdout.print(f"Picture: [bold]{escape(str(run / PICTURE))}[/bold]", soft_wrap=True)
