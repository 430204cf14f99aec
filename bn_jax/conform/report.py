"""The findings as a verdict for each group of vectors, as a score, and as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bn_jax.conform.find import find
from bn_jax.conform.judge import Finding, Level, try_all, unique

COLORS = {"right": "green", "note": "yellow", "wrong": "red", "not offered": "dim"}
WORST_FIRST: tuple[Level, ...] = ("wrong", "note", "right", "not offered")


class Verdict(NamedTuple):
    """What came of a group of vectors.

    Attributes:
        group: what was tried, e.g. "large mean".
        level: the worst of its findings; not offered if nothing was.
        right: how many checks were right.
        tried: how many there were.
        names: the bugs, weaknesses or conventions that were recognized.
        details: sizes of errors and messages, where something was wrong.
    """

    group: str
    level: Level
    right: int
    tried: int
    names: tuple[str, ...]
    details: tuple[str, ...]


def verdicts(findings: Iterable[Finding]) -> list[Verdict]:
    """A verdict for each group, in order."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.group, []).append(finding)
    found = []
    for group, members in groups.items():
        levels = {f.level for f in members}
        level: Level = next(level for level in WORST_FIRST if level in levels)
        worst = [f for f in members if f.level == level]
        tried = [f for f in members if f.level != "not offered"]
        names = unique(name for f in worst for name in f.names)
        details = unique(f"{f.vector}: {f.detail}" for f in worst if f.detail)
        right = sum(f.level == "right" for f in tried)
        found.append(Verdict(group, level, right, len(tried), names, details))
    return found


def score(findings: Sequence[Finding]) -> str:
    """The score in one line."""
    counts = {level: sum(f.level == level for f in findings) for level in WORST_FIRST}
    tried = len(findings) - counts["not offered"]
    return (
        f"{counts['right']} of {tried} checks right, {counts['note']} with a note, "
        f"{counts['wrong']} wrong; {counts['not offered']} not offered"
    )


def summary(findings: Sequence[Finding]) -> tuple[list[str], list[str]]:
    """What is wrong by name, and what there is to note; each once."""
    found = verdicts(findings)
    wrong = unique(n for v in found if v.level == "wrong" for n in v.names or (v.group,))
    notes = unique(n for v in found if v.level == "note" for n in v.names)
    return list(wrong), list(notes)


def is_wrong(findings: Iterable[Finding]) -> bool:
    """Whether anything is wrong, or nothing could be tried; notes are not."""
    levels = {f.level for f in findings}
    return "wrong" in levels or levels <= {"not offered"}


def table(name: str, findings: Sequence[Finding]) -> Table:
    """A candidate's verdicts: a row for each group."""
    result = Table("", "right", "verdict", title=escape(name), title_justify="left")
    for v in verdicts(findings):
        lines = list(v.names) if v.names else [v.level]
        if v.level == "note":
            lines = [f"note: {line}" for line in lines]
        if v.level == "wrong":
            lines = ["; ".join(v.names) or "wrong", *v.details[:3]]
        if len(v.details) > 3 and v.level == "wrong":
            lines.append(f"and {len(v.details) - 3} more like these")
        color, count = COLORS[v.level], f"{v.right} of {v.tried}" if v.tried else "–"
        text = "\n".join(escape(line) for line in lines)
        result.add_row(v.group, count, f"[{color}]{text}[/{color}]")
    return result


def comparison(all_findings: Mapping[str, Sequence[Finding]]) -> Table:
    """Several candidates side by side: a row for each group."""
    short = [name.rpartition(":")[2] for name in all_findings]
    names = short if len(set(short)) == len(short) else list(all_findings)
    result = Table("", *map(escape, names))
    columns = [verdicts(findings) for findings in all_findings.values()]
    for row in zip(*columns, strict=True):
        cells = [f"[{COLORS[v.level]}]{v.level}[/{COLORS[v.level]}]" for v in row]
        result.add_row(row[0].group, *cells)
    return result


def try_targets(targets: Sequence[str], console: Console) -> bool:
    """Try batch norms by name, print what came of it, and return whether nothing is wrong.

    Raises:
        ValueError: one of them cannot be imported or called.
    """
    found: dict[str, list[Finding]] = {}
    for candidate in [find(target) for target in targets]:
        with console.status(f"trying {escape(candidate.name)}"):
            findings = found[candidate.name] = try_all(candidate)
        console.print(table(candidate.name, findings))
        console.print(score(findings), highlight=False)
    if len(found) > 1:
        console.print(comparison(found))
    return not any(map(is_wrong, found.values()))
