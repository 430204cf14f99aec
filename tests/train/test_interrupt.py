"""Ctrl-C and worse, in real processes: the run is kept up to there, and can go on."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from bn_jax.train.evaluation import evaluate_run
from bn_jax.train.run_folder import RunFolder
from bn_jax.train.stopping import asked_to_stop
from tests.train.conftest import heeding_interrupts

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
    """Endless runs at once, and how each of them was ended: by name."""
    signals = {"before": signal.SIGINT, "after": signal.SIGINT, "killed": signal.SIGKILL}
    signals["ended"] = signal.SIGTERM
    root = tmp_path_factory.mktemp("stopped")
    every = {"before": 10**8, "after": 100, "killed": 20, "ended": 10**8}
    running = {
        name: start("train", *ENDLESS, "--checkpoint-every", every[name], "--run-dir", root / name)
        for name in signals
    }

    def due(name):
        if name in ("before", "ended"):
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


@pytest.mark.parametrize("name", ["before", "after", "killed", "ended"])
def test_no_half_of_a_file_under_its_name(name, stopped):
    folder = stopped[name].folder
    names = {path.name for path in folder.iterdir()}
    assert names <= {"config.json", "metrics.jsonl", "checkpoints"}
    RunFolder(folder).read_config()
    assert all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("name", ["before", "after", "ended"])
def test_a_run_that_is_asked_to_stop_keeps_what_it_has(name, stopped):
    """By Ctrl-C and by SIGTERM; whether a checkpoint was due or not."""
    folder, status, stderr = stopped[name]
    newest = max(checkpoints(folder), key=lambda path: int(path.name))
    said = f"stopped at step {int(newest.name):,} of the network with batch norm; to go on: "
    said += "bn-jax train --resume"
    assert (status, stderr) == (143 if name == "ended" else 130, f"{said} {folder}\n")
    (row,) = evaluate_run(RunFolder(folder))
    assert row["step"] == int(newest.name)
    assert 0 <= row["test_accuracy"] <= 1


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


@pytest.mark.usefixtures("heeded")
def test_sigterm_while_the_data_is_read(main, capsys, monkeypatch):
    load = "bn_jax.train.experiment.load"
    monkeypatch.setattr(load, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main("train") == 143
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.usefixtures("heeded")
def test_who_asks_twice_is_heard_at_once():
    with asked_to_stop() as status:
        assert status() == 0
        signal.raise_signal(signal.SIGINT)
        assert status() == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with asked_to_stop() as status:
        signal.raise_signal(signal.SIGTERM)
        assert status() == 143


def test_a_second_interrupt_while_the_first_is_answered_leaves_no_traceback():
    program = (
        "import signal, sys\n"
        "from bn_jax import cli\n"
        "def interrupt(*_, **__): signal.raise_signal(signal.SIGINT)\n"
        "cli.run_command = cli.stderr.print = interrupt\n"
        "cli.program()"
    )
    with heeding_interrupts():
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
