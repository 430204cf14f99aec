"""Writes the tables of RESULTS.md and of the README from the recorded results.

A table stands between two comments of the page, `<!--NAME-->` and `<!--/NAME-->`. After a change to
bn_jax/bench/results, write all of them anew, in a checkout, with: python -m bn_jax.bench.pages
"""

import re
from pathlib import Path

from bn_jax.bench.tables import TABLES, speed, traffic

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "bn_jax" / "bench" / "RESULTS.md")


def all_tables() -> dict[str, list[str]]:
    """Each table's lines, by the name in its comments."""
    made = {name: table.lines() for name, table in TABLES.items()}
    return made | {"traffic": traffic(), "speed": speed()}


def renewed(page: str) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: it names a table that there is not.
    """
    tables = all_tables()

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(f"<!--{name}-->: no such table; there are {', '.join(tables)}")
        return "\n".join([f"<!--{name}-->", *tables[name], f"<!--/{name}-->"])

    return re.sub(r"<!--([\w-]+)-->\n.*?<!--/\1-->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
