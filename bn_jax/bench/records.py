"""The recorded results, bn_jax/bench/results/*.json, as one list of records.

Each file has the form of the bench.json that `bn-jax bench` leaves: an environment (machine,
versions, the date where it is known) and rows of figures for each suite. A record is a row that
knows its suite and its file. Numbers keep the digits they are written with.
"""

import functools
import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")
Record = dict[str, Any]


@functools.cache
def load() -> tuple[Record, ...]:
    """All records, the environments among them."""
    found: list[Record] = []
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
        found.append({"file": path.stem, "suite": "environment", **content["environment"]})
        for suite, part in content["suites"].items():
            found += [{"file": path.stem, "suite": suite, **row} for row in part["rows"]]
    return tuple(found)


def select(wanted: Mapping[str, Any]) -> Record | None:
    """The record whose fields have these values, if there is one.

    Raises:
        ValueError: there are several.

    >>> select({"file": "cpu", "suite": "fold", "what": "compilation"})["ratio"]
    Decimal('1.6')
    """
    found = [r for r in load() if all(r.get(key) == value for key, value in wanted.items())]
    if len(found) > 1:
        raise ValueError(f"{dict(wanted)}: {len(found)} records; say more of what is wanted")
    return found[0] if found else None


def show(value: Any, digits: int = 2) -> str:
    """A figure as text: with its own digits, but no more than so many decimals; from 100, none.

    >>> show(Decimal("1.10")), show(33038), show(Decimal("1.51789")), show(Decimal("0.0003"))
    ('1.10', '33,038', '1.52', '3e-4')
    >>> show([Decimal("0.89"), Decimal("1.06")])
    '0.89 to 1.06'
    """
    if isinstance(value, list):
        return " to ".join(show(item, digits) for item in value)
    if isinstance(value, str):
        return value
    number = Decimal(value)
    if 0 < abs(number) < Decimal("0.01"):
        mantissa, _, exponent = f"{number:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    digits = 0 if abs(number) >= 100 else digits
    exponent = number.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -digits:
        number = number.quantize(Decimal(1).scaleb(-digits))
    return f"{number:,}"
