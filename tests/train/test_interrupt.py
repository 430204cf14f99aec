"""Ctrl-C and worse, in real processes: the last checkpoint stays good, and is named."""

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from bn_jax.train.experiment import evaluate_run
from bn_jax.train.run_folder import RunFolder

ENDLESS = ("--steps", 10**8, "--evaluate-every", 20, "--hidden", 10, "--norm", "batch")

needs_signals = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
pytestmark = [needs_signals, pytest.mark.usefixtures("lenient")]


def wait_until(condition, process, seconds=120):
    """Waits for what a running process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def checkpoints(folder):
    """Finished ones: their names are plain numbers."""
    arm = folder / "checkpoints" / "batch"
    return [path for path in arm.glob("*") if path.name.isdigit()]


class Stopped(NamedTuple):
    folder: Path
    status: int
    stderr: str


@pytest.fixture(scope="module")
def stopped(start, finish, tmp_path_factory):
    """Three endless runs at once, and how each of them was ended: by name."""
    signals = {"before": signal.SIGINT, "after": signal.SIGINT, "killed": signal.SIGKILL}
    root = tmp_path_factory.mktemp("stopped")
    every = {"before": 10**8, "after": 100, "killed": 20}
    running = {
        name: start("train", *ENDLESS, "--checkpoint-every", every[name], "--run-dir", root / name)
        for name in signals
    }

    def due(name):
        if name == "before":
            # The network as it starts has been evaluated, and JAX compiles the training steps.
            return (root / name / "metrics.jsonl").exists()
        return len(checkpoints(root / name)) == 2

    results = {}
    for name, process in running.items():
        wait_until(lambda name=name: due(name), process)
        process.send_signal(signals[name])
        status, _, stderr = finish(process)
        results[name] = Stopped(root / name, status, stderr)
    return results


@pytest.mark.parametrize("name", ["before", "after", "killed"])
def test_no_half_of_a_file_under_its_name(name, stopped):
    folder = stopped[name].folder
    names = {path.name for path in folder.iterdir()}
    assert names <= {"config.json", "metrics.jsonl", "checkpoints"}
    RunFolder(folder).read_config()
    assert all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_before_a_checkpoint(stopped):
    _, status, stderr = stopped["before"]
    assert (status, stderr) == (130, "stopped; no checkpoint was due yet\n")


def test_after_a_checkpoint(stopped):
    folder, status, stderr = stopped["after"]
    newest = max(checkpoints(folder), key=lambda path: int(path.name))
    assert (status, stderr) == (130, f"stopped; the last checkpoint is {newest}\n")
    results = evaluate_run(RunFolder(folder))
    assert results["batch"]["step"] == int(newest.name)
    assert 0 <= results["batch"]["test_accuracy"] <= 1


def test_a_kill(stopped, start, finish):
    """In the middle of everything: the last checkpoint is good, and can be scored."""
    folder, killed, _ = stopped["killed"]
    assert killed == -signal.SIGKILL
    status, stdout, stderr = finish(start("evaluate", folder))
    assert (status, stderr) == (0, "")
    newest = max(int(path.name) for path in checkpoints(folder))
    assert f" {newest:,} " in stdout


@pytest.mark.usefixtures("heeded")
def test_while_the_data_is_read(main, capsys, monkeypatch):
    monkeypatch.setattr("bn_jax.train.experiment.load", lambda *_, **__: signal.raise_signal(2))
    assert main("train") == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.usefixtures("heeded")
def test_none_is_lost(main, capsys, monkeypatch):
    """Not in a callback of the garbage collector either, where Python ignores exceptions."""

    def during_collection(*_):
        gc.callbacks.remove(during_collection)
        signal.raise_signal(signal.SIGINT)

    def load(*_, **__):
        gc.callbacks.append(during_collection)
        gc.collect()
        watchdog.start()
        time.sleep(40)
        raise AssertionError("the interrupt was lost")

    # One that waits for the end of a system call would wait for ever where that has none.
    late = threading.Event()
    watchdog = threading.Timer(20, late.set)
    monkeypatch.setattr("bn_jax.train.experiment.load", load)
    assert main("train") == 130
    watchdog.cancel()
    assert not late.is_set()
    assert capsys.readouterr().err == "stopped\n"
