"""The report: one page for people (HTML and Markdown), results.json for machines, figures."""

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from bn_jax.files import write_whole
from bn_jax.reproduce.claim import Check, Claim, verdict
from bn_jax.reproduce.intervals import Interval
from bn_jax.reproduce.overview import draw_overview
from bn_jax.reproduce.records import finite

SCHEMA = 1
"""Of results.json; changes when a field is renamed, dropped or redefined."""

MARKS = {"holds": "✓", "does not hold": "✗", "undecided": "?", "holds in part": "◐"}
VECTOR: Any = {"svg.hashsalt": "bn_jax", "svg.fonttype": "path"}  # the same file at each run


def write_report(
    folder: Path, claims: Sequence[Claim], records: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write report.html, report.md, results.json and a folder of figures.

    Args:
        folder: where to.
        claims: in the order of the report.
        records: of each by its name.
    """
    (folder / "figures").mkdir(exist_ok=True)
    sections = [section(folder, claim, records[claim.name]) for claim in claims]
    with matplotlib.rc_context(VECTOR):
        overview = image(draw_overview(claims, [part["raw"] for part in sections]), "svg")
    write_whole(folder / "figures" / "overview.svg", overview)
    first = records[claims[0].name]
    commits = [records[claim.name]["versions"]["commit"] for claim in claims]
    page = {
        "sections": sections,
        "overview": embed(overview),
        "quick": any(records[claim.name]["quick"] for claim in claims),
        "seconds": sum(records[claim.name]["seconds"] for claim in claims),
        "versions": first["versions"],
        "commits": ", ".join(dict.fromkeys(commit[:12] for commit in commits if commit)),
        "date": max(records[claim.name]["date"] for claim in claims),
        "marks": MARKS,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bn_jax.reproduce", "."),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.j2").render(page)
        write_whole(folder / name, text.encode())
    write_whole(folder / "results.json", to_json(claims, records, sections).encode())


def section(folder: Path, claim: Claim, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the pages say of one claim; its figures are written."""
    checks = claim.judge(record["results"])
    with matplotlib.rc_context(VECTOR):
        figure = Figure(layout="constrained")
        claim.draw(record["results"], figure)
        vector = image(figure, "svg")
    write_whole(folder / "figures" / f"{claim.name}.svg", vector)
    write_whole(folder / "figures" / f"{claim.name}.png", image(figure, "png"))
    options = ["--quick"] if record["quick"] else ["--seeds", str(record["seeds"])]
    return {
        "claim": claim,
        "record": record,
        "checks": [
            {"text": c.text, "found": found(c), "outcome": c.outcome, "note": c.note}
            for c in checks
        ],
        "raw": checks,
        "verdict": verdict(checks),
        "held": sum(c.outcome == "holds" for c in checks),
        "figure": embed(vector),
        "command": shlex.join(["bn-jax", "reproduce", claim.name, *options]),
    }


def embed(vector: bytes) -> str:
    """An SVG figure as an address within the page."""
    return "data:image/svg+xml;base64," + base64.b64encode(vector).decode()


def image(figure: Figure, kind: str) -> bytes:
    """A figure as the content of a file, the same at each run."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def found(check: Check) -> str:
    """What was found, in words: a mean with its interval, or a number."""
    if isinstance(check.found, Interval):
        mean, low, high = map(number, check.found)
        return f"{mean} [{low}, {high}]"
    return number(check.found)


def number(value: float) -> str:
    """A number with as many digits as are of use.

    >>> [number(x) for x in (0.97654, -0.0123, 14600.0, 3.14159, 2.5e-9, 0.0, 12.0)]
    ['0.977', '-0.012', '14,600', '3.14', '2.5e-09', '0', '12']
    """
    size = abs(value)
    if size == 0 or (size >= 10 and value == round(value)) or size >= 1000:
        return f"{value:,.0f}"
    if size < 0.0005:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 1 else f"{value:.3g}"


def to_json(
    claims: Sequence[Claim],
    records: Mapping[str, Mapping[str, Any]],
    sections: Sequence[Mapping[str, Any]],
) -> str:
    """All results with their verdicts; times and versions stand apart from what must repeat."""
    results = {
        claim.name: {
            "verdict": part["verdict"],
            "checks": [check_to_json(check) for check in part["raw"]],
            "seeds": records[claim.name]["seeds"],
            "quick": records[claim.name]["quick"],
            "results": records[claim.name]["results"],
        }
        for claim, part in zip(claims, sections, strict=True)
    }
    runs = {
        claim.name: {key: records[claim.name][key] for key in ("date", "seconds", "versions")}
        for claim in claims
    }
    page = {"schema": SCHEMA, "claims": results, "runs": runs}
    return json.dumps(finite(page), allow_nan=False) + "\n"


def check_to_json(check: Check) -> dict[str, Any]:
    """A check with its interval, if it has one."""
    interval = check.found._asdict() if isinstance(check.found, Interval) else {"mean": check.found}
    return {"text": check.text, **interval, "outcome": check.outcome}
