"""A claim is measured again when, and only when, what it depends on has changed."""

import dataclasses
import json

import pytest

from bn_jax.reproduce import records
from bn_jax.reproduce.claims import CLAIMS

CLAIM = CLAIMS["weight-decay"]
ABOUT = {"date": "2026-01-31", "seconds": 1.5, "versions": {}}


def save(folder, claim=CLAIM, quick=False):
    return records.save(folder, claim, 5, quick, {"a": [0.1]}, ABOUT)


def test_a_record_comes_back(tmp_path):
    saved = save(tmp_path)
    assert records.load(tmp_path, CLAIM, 5, False) == saved
    assert saved["results"] == {"a": [0.1]}
    assert [path.name for path in tmp_path.iterdir()] == ["weight-decay-5-seeds.json"]


@pytest.mark.parametrize(("seeds", "quick"), [(6, False), (5, True)])
def test_one_of_other_conditions_does_not(tmp_path, seeds, quick):
    save(tmp_path)
    assert records.load(tmp_path, CLAIM, seeds, quick) is None


@pytest.mark.parametrize("change", [b"", b"{", b"[]", b'{"fingerprint": 1}', b"\xff"])
def test_a_damaged_one_does_not(tmp_path, change):
    save(tmp_path)
    (tmp_path / "weight-decay-5-seeds.json").write_bytes(change)
    assert records.load(tmp_path, CLAIM, 5, False) is None


@pytest.mark.parametrize("lost", ["results", "versions", "seconds"])
def test_one_that_lacks_something_does_not(tmp_path, lost):
    record = save(tmp_path)
    del record[lost]
    (tmp_path / "weight-decay-5-seeds.json").write_text(json.dumps(record))
    assert records.load(tmp_path, CLAIM, 5, False) is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's part that records depend on."""
    package = tmp_path / "package"
    for part in records.MEASURING:
        source = records.PACKAGE / part
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            copy = package / path.relative_to(records.PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(records, "PACKAGE", package)
    return package


@pytest.mark.parametrize("name", ["core/moments.py", "core/xla/sums.py", "reproduce/training.py"])
def test_one_of_other_code_does_not(tmp_path, package, name):
    save(tmp_path)
    with (package / name).open("a") as stream:
        stream.write('\n# A comment.\n"""A docstring."""\n')
    assert records.load(tmp_path, CLAIM, 5, False)
    with (package / name).open("a") as stream:
        stream.write("\nCHANGED = 1\n")
    assert records.load(tmp_path, CLAIM, 5, False) is None


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("RATE, DECAY, STEPS = 0.1", "RATE, DECAY, STEPS = 0.2", True),
        ("jnp.abs(one - other).max()", "jnp.abs(one - other).min()", True),
        ("worst[0.0] <= 1e-6", "worst[0.0] <= 1e-7", False),
        ('yscale="log"', 'yscale="linear"', False),
        ("An exact equivalence", "Exact", False),
    ],
)
def test_a_claims_texts_its_judge_and_its_figure_may_change(old, new, again):
    """They need no new measurement; its numbers and what measures do."""
    source = records.Path(CLAIM.measure.__code__.co_filename).read_text()
    assert source.count(old) == 1
    later = frozenset({"judge", "draw", "claim"})
    prints = [records.code(text.encode(), later) for text in (source, source.replace(old, new))]
    assert (prints[0] != prints[1]) == again


def test_records_of_other_seeds_stay(tmp_path):
    save(tmp_path)
    records.save(tmp_path, CLAIM, 3, False, {}, ABOUT)
    assert records.load(tmp_path, CLAIM, 5, False)
    assert records.load(tmp_path, CLAIM, 3, False)


def test_a_number_that_is_not_finite_is_null(tmp_path):
    found = {"a": [0.5, float("nan")], "b": {"c": [[float("inf")]]}}
    record = records.save(tmp_path, CLAIM, 5, False, found, ABOUT)
    assert record["results"] == {"a": [0.5, None], "b": {"c": [[None]]}}
    text = (tmp_path / "weight-decay-5-seeds.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_each_claim_depends_on_its_own_file():
    prints = {records.fingerprint(claim, 5, False) for claim in CLAIMS.values()}
    assert len(prints) == len(CLAIMS)
    renamed = dataclasses.replace(CLAIM, remark="said better")
    assert records.fingerprint(renamed, 5, False) == records.fingerprint(CLAIM, 5, False)


def test_a_record_is_json_that_others_can_read(tmp_path):
    save(tmp_path)
    record = json.loads((tmp_path / "weight-decay-5-seeds.json").read_text())
    assert record["claim"] == "weight-decay"
