"""TensorBoard's event files say what the metrics say."""

import struct
import sys

import pytest

from bn_jax.train.evaluation import evaluate_run
from bn_jax.train.run_folder import RunFolder
from tests.train.test_experiment import records

TINY = ("--hidden", 8, "--batch-size", 20, "--steps", 4, "--evaluate-every", 2, "--norm", "batch")


def read_events(folder):
    """(step, name) -> value; each record is its length, a checksum, itself and a checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    return found


@pytest.mark.slow
def test_events_are_the_metrics(main, tmp_path, on_digits):
    pytest.importorskip("tensorboardX")
    run = tmp_path / "run"
    assert main("train", *TINY, "--seeds", 2, "--tensorboard", "--run-dir", run) == 0
    for seed in (0, 1):
        events = read_events(run / "tensorboard" / "batch" / f"cell-0-seed-{seed}")
        lines = [line for line in records(run) if line["seed"] == seed]
        names = ("train_loss", "test_accuracy", "examples_per_second", "bad_steps")
        expected = {
            (line["step"], name): line[name]
            for line in lines
            for name in names
            if line[name] is not None
        }
        assert events == pytest.approx(expected)


def test_without_the_library_nothing_begins(main, tmp_path, on_digits, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main("train", *TINY, "--tensorboard", "--run-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --tensorboard needs tensorboardX; install it with: pip install")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_checkpoint_of_a_step_is_scored(main, tmp_path, on_digits, capsys):
    run = tmp_path / "run"
    options = (*TINY, "--checkpoint-every", 2, "--keep", "all", "--run-dir", run)
    assert main("train", *options) == 0
    assert sorted(path.name for path in (run / "checkpoints" / "batch").iterdir()) == ["2", "4"]
    accuracy = {line["step"]: line["test_accuracy"] for line in records(run)}
    for step in (2, 4):
        (row,) = evaluate_run(RunFolder(run), step=step)
        assert (row["step"], row["test_accuracy"]) == (step, accuracy[step])
    assert main("evaluate", run, "--step", 3) == 2
    assert "has no checkpoint of step 3; it kept 2 and 4\n" in capsys.readouterr().err
