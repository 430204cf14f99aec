"""`bn-jax reproduce`, as a process."""

import errno
import json
import os
import subprocess
import sys
import tempfile

import pytest
from rich.console import Console

from bn_jax.reproduce import run
from bn_jax.reproduce.claims import CLAIMS


def reproduce(*arguments, folder):
    environment = {**os.environ, "COLUMNS": "100", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "bn_jax", "reproduce", *arguments, "--output-dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_an_unknown_claim_is_refused_with_those_that_there_are(tmp_path):
    done = reproduce("figure-2", folder=tmp_path / "out")
    assert done.returncode == 2
    assert "figure-2: no such claim; claims are figure-1, robustness" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds 1: must be at least 2, for intervals"),
        (["--seeds", "3", "--quick"], "--seeds"),
    ],
)
def test_flags_that_mean_nothing_are_refused(tmp_path, flags, message):
    done = reproduce(*flags, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    def full(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("it was measured"))
    options = {"seeds": 2, "quick": True, "data_dir": None, "console": Console(quiet=True)}
    with pytest.raises(ValueError, match=r"records cannot be written to \(Read-only"):
        run.reproduce_claims(["weight-decay"], folder=tmp_path, **options)
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match=r"cannot be written to \(Not a directory"):
        run.reproduce_claims(["weight-decay"], folder=tmp_path / "taken", **options)


@pytest.mark.slow
def test_all_claims_run_quickly_and_only_once(tmp_path):
    done = reproduce("--quick", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "none of these verdicts is evidence" in done.stdout
    folder = tmp_path / "quick"
    results = json.loads((folder / "results.json").read_text())["claims"]
    assert list(results) == list(CLAIMS)
    assert all(result["quick"] for result in results.values())
    written = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    again = reproduce("--quick", "weight-decay", "tower", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()} == written
    assert json.loads((folder / "results.json").read_text())["claims"] == results
