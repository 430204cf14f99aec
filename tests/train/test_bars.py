"""What the defaults promise, on the real MNIST: minutes, so run with `-m slow`."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_the_papers_experiment(tmp_path, start):
    """Figure 1(a): .98 with batch norm after 50,000 steps, and .95 in a fraction of the steps."""
    process = start("train", "--run-dir", tmp_path / "run", optimize=True)
    _, stderr = process.communicate(timeout=1800)
    assert process.returncode == 0, stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    with_bn, without = summary["arms"]["batch"], summary["arms"]["none"]
    assert with_bn["steps"] == without["steps"] == 50_000
    assert with_bn["final_test_accuracy"] >= 0.972
    assert with_bn["final_test_accuracy"] > without["final_test_accuracy"]
    assert without["steps_to"]["0.95"] >= 3 * with_bn["steps_to"]["0.95"]
