"""`bn-jax reproduce`: measure what has not been measured yet, and write the report."""

import datetime
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bn_jax.data import load as load_data
from bn_jax.files import locked
from bn_jax.reproduce import records
from bn_jax.reproduce.claim import Claim, verdict
from bn_jax.reproduce.claims import CLAIMS
from bn_jax.reproduce.pace import Pace, committed_seconds
from bn_jax.reproduce.report import write_report
from bn_jax.reproduce.study import Study
from bn_jax.train.versions import versions

QUICK_SEEDS = 2


def reproduce_claims(
    names: Sequence[str],
    *,
    folder: Path,
    seeds: int,
    quick: bool,
    data_dir: Path | None,
    console: Console,
) -> None:
    """Measure claims and write report.html, report.md, results.json and the figures.

    Args:
        names: of the claims, in any order; none for all.
        folder: for records and report. Claims that it has records of are not measured again, and
            are in the report whether they are named or not.
        seeds: of each method.
        quick: take a few steps only.
        data_dir: where the data set is, or None to fetch it.
        console: where to show progress and the verdicts.

    Raises:
        ValueError: a claim is unknown, the folder cannot be written to, or another process does.
    """
    wanted = check_names(names)
    make_writable(folder / "records")
    with ExitStack() as lock:
        try:
            lock.enter_context(locked(folder))
        except BlockingIOError:
            raise ValueError(f"{folder}: another process writes there; choose another") from None
        known = {n: records.load(folder / "records", c, seeds, quick) for n, c in CLAIMS.items()}
        done = {name: record for name, record in known.items() if record is not None}
        missing = [CLAIMS[name] for name in wanted if name not in done]
        if missing:
            data = load_data("mnist", data_dir=data_dir)
            known_times = {} if quick else committed_seconds()
            pace = Pace([claim.name for claim in missing], known_times, seeds / 5)
            with progress_bar(console) as bar:
                for claim in missing:
                    done[claim.name] = measure(claim, data, folder, seeds, quick, bar, pace)
        claims = [claim for name, claim in CLAIMS.items() if name in done]
        console.print(verdict_table(claims, done))
        if quick:
            console.print(
                "[bold]A quick run of a few steps: none of these verdicts is evidence.[/]"
            )
        write_report(folder, claims, done)
    page = folder / "report.html"
    console.print(f"Report: [bold]{escape(str(page))}[/bold]", soft_wrap=True)


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing, and try to write there: before what takes long."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to ({error.strerror or error}); give permission, or "
            "choose another --output-dir"
        ) from error


def check_names(names: Sequence[str]) -> list[str]:
    """The names in the order of the report, or all of them."""
    for name in names:
        if name not in CLAIMS:
            raise ValueError(f"{name}: no such claim; claims are {', '.join(CLAIMS)}")
    return [name for name in CLAIMS if name in names or not names]


def measure(
    claim: Claim, data: Any, folder: Path, seeds: int, quick: bool, bar: Progress, pace: Pace
) -> dict[str, Any]:
    """A claim's new record."""
    task = bar.add_task(claim.name, total=None, what="")
    begun = time.monotonic()

    def watch(what: str, step: int, steps: int) -> None:
        left = f"{what}; about {pace.left() / 60:.0f} min left of all"
        bar.update(task, completed=step, total=steps, what=left)

    results = claim.measure(Study(data, seeds, quick, watch))
    seconds = round(time.monotonic() - begun, 1)
    pace.next()
    bar.update(task, what=f"measured in {seconds:,.0f} s")
    about = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "seconds": seconds,
        "versions": versions(),
    }
    return records.save(folder / "records", claim, seeds, quick, results, about)


def progress_bar(console: Console) -> Progress:
    """A line per claim: what is being trained, steps, time."""
    return Progress(
        TextColumn("{task.description:>15}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
        console=console,
    )


def verdict_table(claims: Sequence[Claim], done: dict[str, Any]) -> Table:
    """The claims with their verdicts."""
    table = Table("claim", "checks that hold", "verdict", title="Verdicts", title_justify="left")
    for claim in claims:
        checks = claim.judge(done[claim.name]["results"])
        held = sum(check.outcome == "holds" for check in checks)
        table.add_row(claim.title, f"{held} of {len(checks)}", verdict(checks))
    return table
