"""The command line as a user has it: real processes, on the real MNIST."""

import json
import logging
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bn_jax.commands.console import quiet_orbax
from bn_jax.train.config import TrainConfig
from bn_jax.train.versions import commit

STEPS, EVERY = 1000, 250
TRAINING = Path(__file__).parents[2] / ".docs" / "training.md"


@pytest.fixture(scope="module")
def twins(start, finish, tmp_path_factory):
    """Two runs of one command, both arms: [(run folder, exit status, stdout, stderr)]."""
    folders = [tmp_path_factory.mktemp("twin") / "run" for _ in range(2)]
    common = ("--steps", STEPS, "--evaluate-every", EVERY, "--checkpoint-every", EVERY)
    # At once, on the two cores that there may be.
    running = [start("train", *common, "--run-dir", folder, optimize=True) for folder in folders]
    return [(f, *finish(process)) for f, process in zip(folders, running, strict=True)]


@pytest.fixture(scope="module")
def run(twins):
    folder, status, stdout, stderr = twins[0]
    assert status == 0, stderr
    return folder, stdout, stderr


@pytest.fixture(scope="module")
def summary(run):
    return json.loads((run[0] / "summary.json").read_text())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_everything_is_in_the_run_folder(run):
    folder, _, _ = run
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "curves.png", "checkpoints"}
    for arm in ("batch", "none"):
        steps = {path.name for path in (folder / "checkpoints" / arm).iterdir()}
        assert steps == {str(STEPS - EVERY), str(STEPS)}
    with Image.open(folder / "curves.png") as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 50


def test_the_configuration_is_what_was_asked(run):
    folder, _, _ = run
    expected = TrainConfig(
        steps=STEPS, evaluate_every=EVERY, checkpoint_every=EVERY, run_dir=folder
    )
    assert TrainConfig.from_json((folder / "config.json").read_text()) == expected


def test_a_line_per_arm_and_evaluation(run):
    lines = metrics(run[0])
    steps = range(0, STEPS + 1, EVERY)
    assert [(line["arm"], line["step"]) for line in lines] == [
        (arm, step) for arm in ("batch", "none") for step in steps
    ]
    keys = {"arm", "step", "train_loss", "test_accuracy", "examples_per_second"}
    keys |= {"bad_steps", "diverged", "seed", "cell"}
    assert all(line.keys() == keys for line in lines)


def test_the_summary_is_that_of_the_lines(run, summary):
    for arm in ("batch", "none"):
        lines = [line for line in metrics(run[0]) if line["arm"] == arm]
        row = summary["arms"][arm]
        assert row["final_test_accuracy"] == lines[-1]["test_accuracy"]
        assert row["best_test_accuracy"] == max(line["test_accuracy"] for line in lines)
        for level, step in row["steps_to"].items():
            reached = [x["step"] for x in lines if x["test_accuracy"] >= float(level)]
            assert step == (reached[0] if reached else None)
    assert summary["versions"].keys() >= {"jax", "flax", "optax", "python", "device", "commit"}
    assert summary["schema"] == 1
    assert summary["seconds"] > 0
    documented = {*re.findall(r"^\| `(\w+)` \|", TRAINING.read_text(), re.M)}
    assert metrics(run[0])[0].keys() <= documented


def test_batch_norm_learns_faster(summary):
    """Published for 1,000 steps: more than .85, where the other arm has hardly left .1."""
    with_bn, without = (summary["arms"][arm]["final_test_accuracy"] for arm in ("batch", "none"))
    assert with_bn > 0.88
    assert without < with_bn - 0.2


def test_the_table_is_on_standard_output(run, summary):
    _, stdout, stderr = run
    for arm, title in (("batch", "with batch norm"), ("none", "without")):
        row = rf"{title} +│ +{summary['arms'][arm]['final_test_accuracy']:.4f}"
        assert re.search(row, stdout)
    assert stderr == ""


def test_it_says_where_it_runs_and_what_to_do_next(run):
    folder, stdout, _ = run
    assert re.search(rf"^Training on CPU, jax [\d.]+\w*, run folder {folder}$", stdout, re.M)
    assert stdout.endswith(
        f"Curves: {folder / 'curves.png'}\nScore the checkpoints again: bn-jax evaluate {folder}\n"
    )


def test_the_same_seed_is_the_same_run(twins):
    (one, *_), (two, status, _, stderr) = twins
    assert status == 0, stderr
    first, second = metrics(one), metrics(two)
    for line in (*first, *second):
        del line["examples_per_second"]
    assert first == second


def test_evaluate_says_what_the_summary_says(run, summary, start, finish):
    status, stdout, stderr = finish(start("evaluate", run[0], optimize=True))
    assert (status, stderr) == (0, "")
    for arm, title in (("batch", "with batch norm"), ("none", "without")):
        row = rf"{title} +│ +1,000 +│ +{summary['arms'][arm]['final_test_accuracy']:.4f}"
        assert re.search(row, stdout)


def test_the_console_script_is_this_command_line():
    (script,) = entry_points(group="console_scripts", name="bn-jax")
    assert script.value == "bn_jax.cli:program"


@pytest.fixture(scope="module")
def mistakes(start, finish, tmp_path_factory):
    """Command lines that cannot work: their exit status, standard output, standard error."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").write_text("{}")
    commands = {
        "model": ("train", "--model", "vgg"),
        "steps": ("train", "--steps", "-1"),
        "batch": ("train", "--batch-size", "60001"),
        "taken": ("train", "--run-dir", "taken"),
        "data": ("train", "--data-dir", "nowhere"),
        "run": ("evaluate", "nowhere"),
    }
    running = {name: start(*command, cwd=folder) for name, command in commands.items()}
    results = {name: finish(process) for name, process in running.items()}
    assert [path.name for path in folder.iterdir()] == ["taken"]
    return results


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", r"^error: --model vgg: must be one of mlp, cnn, tower\n$"),
        ("steps", r"^error: --steps -1: must be an integer of at least 0\n$"),
        ("batch", r"^error: --batch-size 60001: must be at most 60000, the number of .*\n$"),
        ("taken", r"^error: --run-dir taken: already holds a run; choose a new folder.*\n$"),
        ("data", r"^error: .*nowhere: found neither train-images-idx3-ubyte.*\n$"),
        ("run", r"^error: nowhere is no run: it has no config.json; give the folder of a run\n$"),
    ],
)
def test_a_mistake_is_one_message(name, message, mistakes):
    status, stdout, stderr = mistakes[name]
    assert status == 2
    assert re.search(message, stderr), stderr
    assert "Traceback" not in stderr + stdout


def test_a_device_that_is_not_here(main, capsys):
    assert main("train", "--device", "tpu") == 2
    assert re.match(r"error: --device tpu: JAX finds none here", capsys.readouterr().err)


def test_the_commit_is_this_packages(tmp_path, monkeypatch):
    """And not that of a repository around it, as of a project with its environment inside."""
    git = ["git", "-C", str(tmp_path)]
    if shutil.which("git") is None:
        pytest.skip("needs git")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    package = tmp_path / "bn_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr("bn_jax.__file__", str(package / "__init__.py"))
    assert commit() is None
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert commit() is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, *identity, "commit", "-q", "-m", "y"], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", commit())
    (package / "__init__.py").write_text("changed")
    assert re.fullmatch(r"[0-9a-f]{40}\+", commit())


def test_late_writes_on_a_full_disk_print_nothing(monkeypatch):
    """And whatever else Python has to ignore is still reported."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    monkeypatch.setattr(logging.getLogger("absl"), "setLevel", lambda _: None)
    quiet_orbax()
    late, other = (
        SimpleNamespace(exc_value=RuntimeError(e)) for e in ("Event loop is closed", "x")
    )
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert reported == [other]
