"""One run in several processes, over loopback: the single process's run, and a common end."""

import ast
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

import bn_jax
from bn_jax.data import load
from bn_jax.train import processes
from bn_jax.train.config import TrainConfig
from bn_jax.train.crash_reporter import MARK, UNMET, report
from bn_jax.train.evaluation import evaluate_run, load_progress
from bn_jax.train.loop import train
from bn_jax.train.processes import by_first, check_same
from bn_jax.train.run_folder import RunFolder
from bn_jax.train.sharding import choose_devices
from tests.train.test_interrupt import wait_until
from tests.train.test_resume import assert_same_end

needs_signals = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
pytestmark = [needs_signals, pytest.mark.usefixtures("lenient")]

STEPS = ("--norm", "batch", "--hidden", 16, "--batch-size", 64, "--evaluate-every", 100)
ENDLESS = ("--norm", "none", "--hidden", 8, "--batch-size", 16, "--evaluate-every", 5)
ENDLESS += ("--checkpoint-every", 5, "--steps", 10**8)
GONE = "error: another process of this run is gone, so this one ends too"
BOUND = 60
"""Seconds: twice those of silence after which JAX's service counts a process as gone."""


@pytest.fixture(scope="module")
def launch(start):
    """Starts one command in two processes that meet at a free port of this machine."""

    def run(*arguments, **options) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = ("--coordinator", f"127.0.0.1:{port}", "--processes", 2)
        return [start("train", *arguments, *common, "--process-id", i, **options) for i in range(2)]

    return run


def checkpoints(folder):
    """Finished ones: their names are plain numbers."""
    return [path for path in folder.glob("checkpoints/*/*") if path.name.isdecimal()]


@pytest.fixture(scope="module")
def pair(launch, finish, tmp_path_factory):
    """A run of 200 steps on MNIST: its folder, and each process's status, stdout and stderr."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    processes = launch(*STEPS, "--steps", 200, "--run-dir", folder)
    return folder, [finish(process) for process in processes]


def test_one_process_speaks(pair):
    folder, ((status, stdout, stderr), second) = pair
    assert (status, stderr) == (0, "")
    assert second == (0, "", "")
    assert stdout.count("Test accuracy on mnist") == 1
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "curves.png", "checkpoints"}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert RunFolder(folder).read_config().devices == 2


def test_the_run_is_that_of_a_single_process(pair):
    """Parameters and statistics after 200 steps, and the accuracy that one process measures."""
    folder, _ = pair
    data = load("mnist")
    fields = {"norm": "batch", "hidden": (16,), "batch_size": 64, "evaluate_every": 100}
    config = TrainConfig(steps=200, **fields)
    *_, ((state, *_), (evaluation,)) = train(config, "batch", data)
    progress = load_progress(RunFolder(folder).read_config(), "batch", data, RunFolder(folder))
    other = progress.state
    assert (int(other.step), other.key) == (200, state.key)
    # Means of 64 terms that are at most 1, halved otherwise: 64·2⁻²⁴ = 4e-6 per step at most and
    # its root, 5e-7, as a rule, times a rate of 0.15; over 200 steps √200 times as much: 1e-6.
    # Curvature may multiply that by a few. Kernels and statistics are of size 1 and less, but for
    # the variance of a pre-activation, of which the same holds relatively.
    for name in ("params", "batch_stats"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            getattr(other, name),
            getattr(state, name),
        )
    (row,) = evaluate_run(RunFolder(folder))
    assert row["step"] == 200
    assert row["test_accuracy"] == pytest.approx(evaluation.test_accuracy, abs=1e-3)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, signal.SIGKILL),  # with which JAX's service goes too
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, signal.SIGKILL), (0, signal.SIGINT), (1, signal.SIGINT)]
        ),
    ],
)
def test_when_one_goes_the_other_says_so_and_goes(number, name, launch, finish, tmp_path):
    folder = tmp_path / "run"
    processes = launch(*ENDLESS, "--run-dir", folder)
    end = time.monotonic() + 120
    while len(checkpoints(folder)) < 2:
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        assert time.monotonic() < end, "no checkpoints in time"
        time.sleep(0.01)
    begun = time.monotonic()
    processes[number].send_signal(name)
    status, _, stderr = finish(processes[1 - number])
    assert time.monotonic() - begun < BOUND
    victim = finish(processes[number])
    assert status != 0
    newest = max(checkpoints(folder), key=lambda path: int(path.name))
    assert stderr.startswith(GONE)
    again = f"to go on: bn-jax train --resume {folder}"
    assert stderr.endswith(f"; the last checkpoint is {newest}; {again}\n")
    assert stderr.count("\n") == 1
    assert victim[0] == (-signal.SIGKILL if name == signal.SIGKILL else 130)
    if name == signal.SIGINT:
        # Who speaks says what is kept.
        said = f"stopped; the last checkpoint is {newest}; {again}\n" if number == 0 else ""
        assert victim[2] == said
    # What is left is good.
    (row,) = evaluate_run(RunFolder(folder))
    assert (row["arm"], row["step"]) == ("none", int(newest.name))


@pytest.mark.slow
def test_two_that_were_killed_go_on_later(launch, finish, tmp_path, pair):
    """To the byte what two processes compute that nobody kills."""
    folder = tmp_path / "run"
    processes = launch(*STEPS, "--steps", 200, "--run-dir", folder, "--checkpoint-every", 100)
    wait_until((folder / "metrics.jsonl").exists, processes[0])
    processes[1].kill()
    assert 0 not in [finish(process)[0] for process in processes]
    assert [finish(p)[::2] for p in launch("--resume", folder)] == [(0, ""), (0, "")]
    assert_same_end(pair[0], folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_sigterm_to_one_stops_both_which_go_on_later(number, launch, finish, tmp_path, pair):
    """To the byte what two processes compute that nobody stops."""
    folder = tmp_path / "run"
    processes = launch(*STEPS, "--steps", 200, "--run-dir", folder, "--checkpoint-every", 100)
    wait_until((folder / "metrics.jsonl").exists, processes[0])
    processes[number].send_signal(signal.SIGTERM)
    (status, _, stderr), other = map(finish, processes)
    assert status == 143
    assert re.fullmatch(
        rf"stopped at step (100|200) of the network with batch norm; .*--resume {folder}\n",
        stderr,
    )
    assert other == (143, "", "")
    (status, _, stderr), other = map(finish, launch("--resume", folder))
    assert (status, stderr) == (0, "")
    assert other == (0, "", "")
    assert_same_end(pair[0], folder)


def test_what_ends_process_0_ends_all(launch, finish, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    processes = launch(*STEPS, "--run-dir", tmp_path)
    (status, _, stderr), (other, _, heard) = map(finish, processes)
    message = f"--run-dir {tmp_path}: already holds a run; choose a new folder, or move it away\n"
    assert (status, stderr) == (2, f"error: {message}")
    assert (other, heard) == (2, f"error: process 0 says: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_processes_of_different_runs_refuse_each_other(start, finish, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = (*STEPS, "--run-dir", tmp_path / "run", "--coordinator", f"127.0.0.1:{port}")
    common += ("--processes", 2)
    first = start("train", *common, "--process-id", 0)
    second = start("train", *common, "--process-id", 1, "--seed", 1, "--learning-rate", 1)
    for process in first, second:
        status, stdout, stderr = finish(process)
        assert (status, stdout) == (2, "")
        assert stderr.startswith("error: --learning-rate and --seed: not the same in all processes")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ([(1, 2), (1, 2)], None),
        ([(1, 3), (1, 2)], "--batch-size"),  # the one in the middle
        ([(1, 2), (4, 3)], "--seed and --batch-size"),
    ],
)
def test_every_process_is_compared(others, names, monkeypatch):
    def gather(own):
        def marks(values):
            return [zlib.crc32(repr(value).encode()) for value in values]

        return np.array([own.tolist(), *map(marks, others)], np.uint32)

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    refused = pytest.raises(ValueError, match=f"^{names}: not the same in all processes")
    with refused if names else nullcontext():
        check_same({"seed": 1, "batch_size": 2})


def test_what_the_system_refuses_process_0_reaches_all(monkeypatch):
    """Else they would wait for it in vain."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "broadcast", lambda content: said.append(content) or content)

    def refuse():
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        by_first(refuse)
    assert said == [b"-[Errno 13] Permission denied"]
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "broadcast", lambda _: said[0])
    with pytest.raises(ValueError, match=r"process 0 says: .*Permission denied"):
        by_first(refuse)


def test_nothing_in_the_package_unpickles():
    """What comes over the network or from a file is not run."""
    for path in Path(bn_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & {*names}, path


def test_each_process_makes_its_share_of_a_cpu(monkeypatch):
    made = []
    monkeypatch.setattr(jax.config, "update", lambda *what: made.append(what))
    choose_devices("auto", 8, 2)
    choose_devices("auto", 3)
    for few in [(None,), (1,), (None, 4), (2, 2)]:
        choose_devices("auto", *few)
    assert made == [("jax_num_cpu_devices", 4), ("jax_num_cpu_devices", 3)]
    with pytest.raises(ValueError, match=r"^--devices 100000: must be at most 256 in a process$"):
        choose_devices("auto", 100_000, 2)


@pytest.mark.slow
def test_who_waits_in_vain_says_so(start, finish):
    impatient = "import bn_jax.train.launch as launch\nlaunch.PATIENCE = 1"
    common = ("--coordinator", "127.0.0.1:1", "--processes", 2, "--process-id", 1)
    status, stdout, stderr = finish(start("train", *common, before=impatient))
    assert status != 0
    assert (stdout, stderr) == ("", f"error: {UNMET}\n")


def test_a_failure_of_another_kind_shows_its_text():
    program = (
        "import os\n"
        "from bn_jax.train.crash_reporter import reporting_crashes\n"
        "with reporting_crashes():\n"
        "    os.write(2, b'I0101 of no interest\\nF0101 a check failed\\nstack\\n')\n"
        "    os.abort()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr == "F0101 a check failed\nstack\n"


def said(*lines):
    """What a crash reporter says after these."""
    target = io.StringIO()
    report(io.BytesIO(b"".join(lines)), target)
    return target.getvalue()


def test_the_words_of_a_crash_reporter(tmp_path):
    killed = b"E0101 polled\nF0101 the JAX distributed service detected fatal errors. More\n at\n"
    met = MARK + b"met\n"
    folder = met + MARK + f"folder {tmp_path}\n".encode()
    assert said() == said(b"[Gloo] connected\n") == said(killed, MARK + b"done\n") == ""
    assert said(killed) == f"error: {UNMET}\n"
    assert said(met, killed) == said(folder, killed) == f"{GONE}; no checkpoint was due yet\n"
    for name in ("batch/10", "batch/9", "batch/11.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        # The older the step, the later: as where something was deleted there.
        later = 20 - int(name.partition("/")[2].partition(".")[0])
        os.utime(tmp_path / "checkpoints" / name, (later, later))
    last = f"the last checkpoint is {tmp_path / 'checkpoints' / 'batch' / '10'}"
    last += f"; to go on: bn-jax train --resume {tmp_path}\n"
    assert said(folder, killed) == f"{GONE}; {last}"
    # Told by an exception too, and in the middle of a line of C++'s.
    for lines in [(folder, MARK + b"lost closed\n"), (folder, b"[Gloo]" + MARK + b"lost closed\n")]:
        assert said(*lines, killed) == f"{GONE} (closed); {last}"
