"""The tables of the README and of RESULTS.md are made from the recorded results."""

import json
from decimal import Decimal

import pytest

from bn_jax.bench import pages, records, tables


@pytest.mark.parametrize("path", pages.PAGES, ids=lambda path: path.name)
def test_a_page_is_what_is_recorded(path):
    """If this fails: python -m bn_jax.bench.pages."""
    page = path.read_text(encoding="utf-8")
    assert pages.renewed(page) == page


def test_every_table_is_on_a_page_once():
    text = "".join(path.read_text(encoding="utf-8") for path in pages.PAGES)
    for name in pages.all_tables():
        assert text.count(f"<!--{name}-->") == text.count(f"<!--/{name}-->") == 1


def test_a_table_follows_its_figures(monkeypatch):
    other = [
        r | ({"ratio": Decimal("7.654")} if r.get("contender") == "haiku" else {})
        for r in records.load()
    ]
    page = "before\n<!--speed-->\nold\n<!--/speed-->\nafter\n"
    monkeypatch.setattr(records, "load", lambda: tuple(other))
    lines = pages.renewed(page).splitlines()
    assert "| haiku | 7.65 | – | 7.65 | 7.65 |" in lines
    assert (lines[0], lines[-1]) == ("before", "after")
    with pytest.raises(ValueError, match="no such table; there are"):
        pages.renewed(page.replace("speed", "sped"))
    with pytest.raises(ValueError, match="records; say more"):
        records.select({"suite": "layer"})


def test_what_is_recorded_twice_agrees():
    """Run 1 is the table; one row of RESULTS.md stands for two libraries, one for two machines."""
    for name in ("flax", "flax accurate", "haiku", "torch"):
        run = records.select({"suite": "layer runs", "run": 1, "contender": name})
        fields = {"file": "cpu", "dtype": "float32"}
        assert tables.geometric_mean(name, fields, tables.SHAPES[1:]) == str(run["geometric_mean"])
    for dtype in tables.DTYPES:
        layer = {"suite": "memory", "what": "layer", "dtype": dtype}
        cpu, gpu = (records.select({**layer, "file": file}) for file in ("cpu", "h100"))
        assert cpu["of_flax"] == gpu["of_flax"]
    for file in ("cpu", "h100"):
        y = {"suite": "accuracy", "file": file}
        flax, haiku = (records.select({**y, "contender": name}) for name in ("flax", "haiku"))
        assert flax["error"] == haiku["error"]


def test_every_result_has_its_machine_and_versions():
    for path in records.FOLDER.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert {"device", "jax", "flax"} <= content["environment"].keys()
        assert all(part["rows"] for part in content["suites"].values())
