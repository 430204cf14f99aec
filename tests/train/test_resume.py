"""A run that was stopped goes on, and ends as if it had never been stopped: to the byte."""

import gc
import json
import random
import signal
import time
from contextlib import contextmanager

import pytest

from bn_jax.train import experiment
from bn_jax.train.checkpoint import CheckpointError, finished, read
from bn_jax.train.config import TrainConfig
from bn_jax.train.experiment import Interrupted, run_experiment
from bn_jax.train.run_folder import RunFolder
from tests.train.test_checkpoint import failing
from tests.train.test_experiment import quiet, records
from tests.train.test_interrupt import needs_signals, wait_until

pytestmark = pytest.mark.usefixtures("lenient")

SMALL = {"hidden": (8,), "batch_size": 20, "steps": 14, "evaluate_every": 5, "checkpoint_every": 5}


def lines(folder):
    """The metrics, without times."""
    return [{k: v for k, v in x.items() if k != "examples_per_second"} for x in records(folder)]


def assert_same_end(one, other):
    """The metrics, and every byte of the last checkpoints' arrays."""
    assert lines(one) == lines(other)
    arms = [path.name for path in (one / "checkpoints").iterdir()]
    for arm in arms:
        (a, _), (b, _) = (read(finished(f / "checkpoints" / arm)[-1]) for f in (one, other))
        assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
    assert (other / "summary.json").exists()


def run(folder, resume=False, **options):
    config = TrainConfig(run_dir=folder, **SMALL | options)
    run_experiment(config, quiet(), resume=folder if resume else None)


@pytest.fixture
def stop_after(monkeypatch):
    """From now on a run is asked to stop after some compiled calls."""

    def stop_after(calls):
        @contextmanager
        def asked_to_stop():
            left = [calls]

            def status():
                left[0] -= 1
                return 143 if left[0] == 0 else 0

            yield status

        monkeypatch.setattr(experiment, "asked_to_stop", asked_to_stop)

    return stop_after


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "momentum", "schedule": "cosine", "binarization": "stochastic"},
        pytest.param({"devices": 4, "optimizer": "adam"}, marks=pytest.mark.slow),
        pytest.param({"micro_batches": 2, "average": "cumulative"}, marks=pytest.mark.slow),
    ],
)
def test_stopped_between_any_two_calls(options, tmp_path, on_digits, stop_after, monkeypatch):
    """Between evaluations too, and right after one; in the first arm and in the second."""
    monkeypatch.setattr("bn_jax.train.loop.steps_per_call", lambda *_: 3)
    run(tmp_path / "whole", **options)
    resume, steps = False, []
    # Calls of an arm end at 0, 3, 5, 8, 10, 12 and 14.
    for calls in (2, 1, 3, 5):
        stop_after(calls)
        with pytest.raises(Interrupted, match="to go on: bn-jax train --resume") as stop:
            run(tmp_path / "parts", resume, **options)
        assert stop.value.status == 143
        resume = True
        steps.append(str(stop.value).partition(";")[0])
    assert steps == [
        *(f"stopped at step {n} of the network with batch norm" for n in (3, 5, 12)),
        "stopped at step 8 of the network without batch norm",
    ]
    stop_after(100)
    run(tmp_path / "parts", resume, **options)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    # Once more changes nothing.
    run(tmp_path / "parts", resume, **options)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@failing
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path, on_digits, stop_after, caplog
):
    """All of them damaged: the arm starts again. Metrics stay in the order of the arms."""
    run(tmp_path / "whole")
    run(tmp_path / "parts")
    arms = tmp_path / "parts" / "checkpoints"
    (arms / "batch" / "14" / "_CHECKPOINT_METADATA").unlink()
    (arms / "batch" / "14" / "state" / "manifest.ocdbt").write_bytes(b"")
    for number in (10, 14):
        (arms / "none" / str(number) / "record" / "metadata").write_bytes(b"{}")
    (tmp_path / "parts" / "summary.json").unlink()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"arm": "none", "st')  # as a kill leaves it
    run(tmp_path / "parts", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    named = {f"the checkpoint {arms}/{x} is damaged" for x in ("batch/14", "none/10", "none/14")}
    assert all(name in caplog.text for name in named)
    assert "batch/10" not in caplog.text
    gc.collect()


def test_only_with_the_settings_it_had(tmp_path, on_digits, stop_after):
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"other settings than config.json has \(seed\)"):
        run(tmp_path / "run", resume=True, seed=1)


def test_not_while_it_runs(tmp_path, on_digits, stop_after):
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with RunFolder(tmp_path / "run").locked(), pytest.raises(BlockingIOError, match="another pro"):
        run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_without_its_metrics_it_does_not_go_on(tmp_path, on_digits, stop_after):
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"run: metrics.jsonl lacks what its checkpoints follow"):
        run(tmp_path / "run", resume=True)


def test_a_diverged_arm_stays_so(tmp_path, on_digits, monkeypatch):
    options = {"learning_rate": 1e30, "activation": "relu", "max_bad_steps": 2, "norm": "none"}
    with pytest.raises(experiment.Diverged) as first:
        run(tmp_path / "run", **options)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(experiment.Diverged) as second:
        run(tmp_path / "run", resume=True, **options)
    assert str(first.value) == str(second.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_command_line(main, tmp_path, on_digits, stop_after, capsys):
    options = ("--hidden", 8, "--batch-size", 20, "--steps", 4, "--evaluate-every", 2)
    stop_after(2)
    assert main("train", *options, "--run-dir", tmp_path / "run") == 143
    message = f"the network with batch norm; to go on: bn-jax train --resume {tmp_path}/run\n"
    assert capsys.readouterr().err == f"stopped at step 2 of {message}"
    assert main("train", "--resume", tmp_path / "run", "--steps", 9) == 2
    message = (
        f"--steps: has no effect with --resume; {tmp_path}/run has its own settings. To train "
    )
    message += "longer, or otherwise, start a new run without --resume\n"
    assert capsys.readouterr().err == f"error: {message}"
    assert main("train", "--resume", tmp_path / "nowhere") == 2
    assert "nowhere is no run: it has no config.json" in capsys.readouterr().err
    stop_after(100)
    assert main("train", "--resume", tmp_path / "run", "--data-dir", tmp_path) == 0
    assert "│ with batch norm │" in capsys.readouterr().out
    assert [line["step"] for line in records(tmp_path / "run")] == [0, 2, 4] * 2
    assert RunFolder(tmp_path / "run").read_config().data_dir is None
    # Once more: nothing is trained, and the summary keeps the seconds of the run.
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"seconds": 123.5}))
    assert main("train", "--resume", tmp_path / "run") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"This run has ended, run folder {tmp_path}/run; to train longer, ")
    assert json.loads(summary.read_text())["seconds"] == 123.5


KILLED = ("train", "--hidden", 10, "--steps", 3000, "--evaluate-every", 50, "--norm", "batch")
KILLED += ("--checkpoint-every", 50, "--batch-size", 20)


@pytest.fixture(scope="module")
def uninterrupted(start, finish, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, _, stderr = finish(start(*KILLED, "--run-dir", folder))
    assert (status, stderr) == (0, "")
    assert len(lines(folder)) == 61
    return folder


@pytest.mark.slow
@needs_signals
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_moments(number, uninterrupted, start, finish, tmp_path):
    """In steps, evaluations and checkpoints: after each of 25, `--resume` goes on."""
    folder = tmp_path / "run"
    moments = random.Random(25)
    # Killed once before the first checkpoint may be there, and then wherever it is.
    process = start(*KILLED, "--run-dir", folder)
    wait_until((folder / "metrics.jsonl").exists, process)
    for _ in range(25):
        time.sleep(moments.uniform(0, 0.6))
        if process.poll() is not None:
            break  # it was faster
        process.send_signal(number)
        finish(process)
        before = (folder / "metrics.jsonl").stat().st_mtime_ns
        process = start("train", "--resume", folder)

        def goes_on(before=before):
            return (folder / "metrics.jsonl").stat().st_mtime_ns != before

        wait_until(goes_on, process)
    status, _, stderr = finish(process)
    if status:
        status, _, stderr = finish(start("train", "--resume", folder))
    assert status == 0, stderr
    assert_same_end(uninterrupted, folder)
