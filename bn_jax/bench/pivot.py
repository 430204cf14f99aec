"""Tables of recorded figures, in Markdown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bn_jax.bench.records import select, show

Fields = Mapping[str, Any]


class Pivot(NamedTuple):
    """A table of recorded figures.

    Attributes:
        corner: the heading of the first column.
        columns: heading -> the fields that select its records.
        rows: label -> the same, and what is shown of a record, with {field} for its figures.
    """

    corner: str
    columns: Mapping[str, Fields]
    rows: Mapping[str, tuple[Fields, str]]

    def lines(self) -> list[str]:
        """The table in Markdown."""
        cells = [
            [label, *(cell({**fields, **more}, text) for more in self.columns.values())]
            for label, (fields, text) in self.rows.items()
        ]
        return markdown([self.corner, *self.columns], cells)


def cell(wanted: Fields, text: str) -> str:
    """The figures of a record as text; – if they were not measured."""
    record = select(wanted)
    if record is None or not set(re.findall(r"{([\w-]+)}", text)) <= record.keys():
        return "–"
    return re.sub(r"{([\w-]+)}", lambda field: show(record[field[1]]), text)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    joined = ["| " + " | ".join(line) + " |" for line in lines]
    joined[0] = joined[0].replace("|  |", "| |", 1)
    joined[1] = "|" + "---|" * len(head)
    return joined
