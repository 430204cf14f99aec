"""A run's folder is new, says what it cannot do, and never holds half a file under its name."""

import errno
import math
import os
import re
from datetime import datetime
from pathlib import Path

import pytest

from bn_jax.train import run_folder
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import Evaluation
from bn_jax.train.run_folder import RunFolder, RunFolderError, make_folder

needs_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs a device that is always full"
)


@pytest.fixture
def full_disk(monkeypatch):
    """As the operating system tells of it when bytes are to reach the disk."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_and_its_parents(tmp_path):
    config = TrainConfig(run_dir=tmp_path / "a" / "b", steps=7)
    folder = RunFolder.create(config)
    assert folder.path == tmp_path / "a" / "b"
    assert names(folder.path) == ["config.json"]
    assert folder.read_config() == config


def test_an_empty_folder_will_do(tmp_path):
    RunFolder.create(TrainConfig(run_dir=tmp_path))
    assert names(tmp_path) == ["config.json"]


def test_by_default_it_is_named_by_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = RunFolder.create(TrainConfig()).path
    assert path.is_relative_to("runs")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}", path.name)
    assert names(tmp_path / path) == ["config.json"]


@pytest.mark.parametrize(("name", "kept"), [("config.json", "a run"), ("other", "other files")])
def test_a_taken_folder_stays_as_it_is(name, kept, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        RunFolderError, match=rf"--run-dir {tmp_path}: already holds {kept}; choose"
    ):
        RunFolder.create(TrainConfig(run_dir=tmp_path))
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("below", [".", "run"])
def test_where_no_folder_can_be(below, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below
    with pytest.raises(RunFolderError, match=rf"{path} cannot be written .*choose.*--run-dir"):
        RunFolder.create(TrainConfig(run_dir=path))


@pytest.mark.parametrize("name", ["lr[0.1]", "back\\slash"])
def test_a_name_that_orbax_does_not_take_as_it_is(name, tmp_path, monkeypatch):
    """Its checkpoints could not be read, or would lie elsewhere."""
    monkeypatch.chdir(tmp_path)
    message = rf"--run-dir {re.escape(name)}: must not have . in its name, where orbax .*another"
    with pytest.raises(RunFolderError, match=message):
        RunFolder.create(TrainConfig(run_dir=Path(name)))
    assert names(tmp_path) == []


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    class Clock:
        now = staticmethod(lambda: datetime(2026, 1, 31, 12))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bn_jax.train.run_folder.datetime", Clock)
    paths = [RunFolder.create(TrainConfig(seed=seed)).path for seed in range(3)]
    assert [path.name for path in paths] == [f"2026-01-31-120000{end}" for end in ("", "-2", "-3")]
    assert [RunFolder(path).read_config().seed for path in paths] == [0, 1, 2]


def test_of_two_runs_that_find_one_folder_empty_one_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))
    RunFolder.create(TrainConfig(run_dir=tmp_path, seed=1))
    with pytest.raises(RunFolderError, match="already holds a run; choose a new folder"):
        RunFolder.create(TrainConfig(run_dir=tmp_path, seed=2))
    assert RunFolder(tmp_path).read_config().seed == 1


def test_one_trains_in_a_folder_and_another_is_refused(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    message = rf"{tmp_path}: another process is training there; wait until it ends"
    with folder.locked(), pytest.raises(BlockingIOError, match=message), folder.locked():
        raise AssertionError("both are in")
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path)
    with folder.locked(), pytest.raises(BlockingIOError), RunFolder(link).locked():
        pass
    with RunFolder(link).locked():  # it is free again
        pass
    with folder.locked():
        assert names(tmp_path) == []
    # Of the processes of one run, the first alone has the lock, and writes.
    with folder.locked():
        monkeypatch.setattr(run_folder, "is_first", lambda: False)
        with folder.locked():
            folder.write("summary.json", "{}")
            folder.append("metrics.jsonl", "{}")
    assert names(tmp_path) == []


def test_a_link_under_a_name_for_what_is_being_written_is_not_followed(tmp_path, monkeypatch):
    """Nobody can guess that name; and were it there, it would not be followed."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".summary.json.guessed.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(RunFolderError, match=r"summary.json cannot be written"):
        RunFolder(tmp_path).write("summary.json", "theirs")
    assert (tmp_path / "mine").read_text() == "mine"


def test_metrics_come_back_as_they_were(tmp_path):
    folder = RunFolder(tmp_path)
    arms = {
        "batch": [Evaluation(0, math.nan, 0.1, 0.0), Evaluation(5, 1 / 3, 2 / 3, 1e5 / 3, 1)],
        "none": [Evaluation(0, math.nan, 0.1, 0.0, seed=3, diverged=True)],
    }
    folder.write_metrics(arms, TrainConfig())
    text = (tmp_path / "metrics.jsonl").read_text()
    # What is no evaluation is passed over; a kill in the middle of a line leaves such an end.
    (tmp_path / "metrics.jsonl").write_text("5\n[]\n{}\n" + text + text[:40])
    again = folder.read_metrics()
    folder.write_metrics(again, TrainConfig())
    assert (tmp_path / "metrics.jsonl").read_text() == text
    assert again["batch"][1] == arms["batch"][1]


def test_whole_files(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write("summary.json", "{}")
    folder.write("summary.json", "√")
    folder.write("curves.png", b"\x89PNG")
    assert (tmp_path / "summary.json").read_bytes() == "√".encode()
    assert (tmp_path / "curves.png").read_bytes() == b"\x89PNG"
    assert names(tmp_path) == ["curves.png", "summary.json"]


def test_lines(tmp_path):
    folder = RunFolder(tmp_path)
    for line in ("one\n", "two\n"):
        folder.append("metrics.jsonl", line)
        # What another process sees at once.
        assert (tmp_path / "metrics.jsonl").read_text().endswith(line)
    assert (tmp_path / "metrics.jsonl").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("name", ["config.json", "summary.json", "curves.png"])
def test_a_full_disk_leaves_no_half_of_a_file(name, tmp_path, full_disk):
    with pytest.raises(
        RunFolderError, match=rf"{tmp_path / name} cannot be written \(No space left"
    ):
        RunFolder(tmp_path).write(name, "x" * 10_000)
    assert names(tmp_path) == []


def test_a_full_disk_keeps_the_old_file(tmp_path, full_disk):
    folder = RunFolder(tmp_path)
    (tmp_path / "summary.json").write_text("old")
    with pytest.raises(RunFolderError, match=r"No space left.*make room"):
        folder.write("summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"


@needs_full_device
def test_a_full_disk_under_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"metrics.jsonl cannot be written \(No space left"):
        RunFolder(tmp_path).append("metrics.jsonl", "{}\n")


def test_an_interrupt_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    """A file is under its name only after its bytes are on the disk."""

    def interrupt(_):
        (name,) = names(tmp_path)
        assert re.fullmatch(r"\.summary\.json\.\w{16}\.partial", name)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).write("summary.json", "{}")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is no run: it has no config.json"),
        ("{", r"config.json cannot be read: .*line 1 column"),
        ("[]", r"config.json cannot be read: .*not a JSON object"),
        ('{"momentum": 1}', r"config.json cannot be read: unknown field 'momentum'"),
        ('{"steps": "5"}', r"config.json cannot be read: --steps '5': must be an integer"),
        (b"\xff\xfe", r"config.json cannot be read: .*decode"),
        ("[" * 100_000, r"config.json cannot be read: .*recursion"),
    ],
)
def test_a_configuration_that_cannot_be_read(content, message, tmp_path):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(RunFolderError, match=message) as caught:
        RunFolder(tmp_path).read_config()
    assert str(tmp_path) in str(caught.value)


def test_a_run_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file.config.json cannot be read"):
        RunFolder(tmp_path / "file").read_config()


@pytest.mark.parametrize("processes", [1, 2])
def test_other_processes_are_told_the_whole_path(processes, tmp_path, monkeypatch):
    """They may have been started in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.process_count", lambda: processes)
    path = make_folder(TrainConfig(run_dir=Path("run")))
    assert path == (Path("run") if processes == 1 else tmp_path / "run")
