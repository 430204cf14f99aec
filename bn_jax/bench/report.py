"""The result of a suite: rows of figures, bars and the environment, as tables and as bench.json."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

LIBRARIES = ("jax", "flax", "optax", "dm-haiku", "equinox", "keras", "torch")


class Bar(NamedTuple):
    """A measured value and the bound that it should keep.

    Attributes:
        what: the name of the measurement.
        value: the measured value.
        bound: the bound.
        at_least: whether value must be at least bound; otherwise at most.

    >>> Bar("flax / bn_jax", 1.5, 1.2, at_least=True).met
    True
    """

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the value keeps its bound; NaN does not."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Report(NamedTuple):
    """The result of one suite.

    Attributes:
        suite: the suite's name.
        rows: the figures; dicts with the same keys.
        tables: the rows for reading.
        bars: values and their bounds.

    >>> rows = [{"contender": "flax", "ratio": 1.5}]
    >>> Report("layer", rows, tables=[], bars=[]).suite
    'layer'
    """

    suite: str
    rows: list[dict[str, Any]]
    tables: list[Table]
    bars: list[Bar]


def environment() -> dict[str, Any]:
    """The machine and the versions of libraries, to be read with every figure."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def processor() -> str:
    """The CPU's name, if the system provides it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def show(report: Report, console: Console) -> None:
    """Print the tables, then the bars."""
    for table in report.tables:
        console.print(table)
    if report.bars and len(report.bars) > 12 and all(bar.met for bar in report.bars):
        console.print(f"[green]All {len(report.bars)} bars are met.[/green]")
        return
    bars = Table("", "measured", "bar", "", title="Bars", title_justify="left")
    for bar in report.bars:
        bound = f"{'≥' if bar.at_least else '≤'} {bar.bound:.3g}"
        verdict = "[green]met[/green]" if bar.met else "[red]missed[/red]"
        bars.add_row(bar.what, f"{bar.value:.3g}", bound, verdict)
    if report.bars:
        console.print(bars)


def save(reports: Sequence[Report], folder: Path) -> Path:
    """Write bench.json atomically; numbers that are not finite become null."""
    content = {
        "environment": environment(),
        "suites": {
            report.suite: {
                "rows": report.rows,
                "bars": [bar._asdict() | {"met": bar.met} for bar in report.bars],
            }
            for report in reports
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "bench.json", folder / "bench.json.partial"
    partial.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    partial.replace(path)
    return path


def finite(value: Any) -> Any:
    """A copy with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
