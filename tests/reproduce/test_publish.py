"""The committed report is what its results make: a changed band or text cannot disagree with it."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from bn_jax.reproduce.claims import CLAIMS
from bn_jax.reproduce.publish import REPORT, publish


@pytest.fixture(scope="module")
def anew(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    publish(REPORT / "results.json", folder)
    return folder


def test_the_committed_report_is_what_its_results_make(anew):
    for name in ("report.md", "results.json"):
        assert (anew / name).read_text() == (REPORT / name).read_text(), (
            "run python -m bn_jax.reproduce.publish"
        )
    figures = {path.name for path in (REPORT / "figures").iterdir()}
    assert figures == {path.name for path in (anew / "figures").iterdir()}
    assert figures == {f"{name}.svg" for name in (*CLAIMS, "overview")}
    for name in figures:  # matplotlib's versions draw the same data by different bytes
        ElementTree.parse(REPORT / "figures" / name)


def test_it_is_evidence():
    results = json.loads((REPORT / "results.json").read_text())
    assert results["claims"].keys() == CLAIMS.keys()
    for result in results["claims"].values():
        assert result["seeds"] >= 5
    commits = {run["versions"]["commit"] for run in results["runs"].values()}
    assert all(commits)
    assert all(CLAIMS[name].remark for name in CLAIMS)


@pytest.mark.parametrize("change", ["quick", "missing"])
def test_a_run_that_is_no_evidence_is_not_published(tmp_path, change):
    results = json.loads((REPORT / "results.json").read_text())
    if change == "quick":
        results["claims"]["noise"]["quick"] = True
    else:
        del results["claims"]["noise"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"not evidence.*noise"):
        publish(tmp_path / "results.json", tmp_path / "report")
    assert not (tmp_path / "report").exists()
