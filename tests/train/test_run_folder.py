"""A run's folder is new, says what it cannot do, and never holds half a file under its name."""

import os
import re
from pathlib import Path

import pytest

from bn_jax.train.config import TrainConfig
from bn_jax.train.run_folder import RunFolder, RunFolderError

needs_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs a device that is always full"
)


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


def test_a_name_that_orbax_takes_for_a_pattern(tmp_path, monkeypatch):
    """Its checkpoints could be written but not read."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match=r"--run-dir lr\[0.1\]: must not have \[ .*another"):
        RunFolder.create(TrainConfig(run_dir=Path("lr[0.1]")))
    assert names(tmp_path) == []


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


@needs_full_device
@pytest.mark.parametrize("name", ["config.json", "summary.json", "curves.png"])
def test_a_full_disk_leaves_no_half_of_a_file(name, tmp_path):
    (tmp_path / f".{name}.partial").symlink_to("/dev/full")
    with pytest.raises(
        RunFolderError, match=rf"{tmp_path / name} cannot be written \(No space left"
    ):
        RunFolder(tmp_path).write(name, "x" * 10_000)
    assert names(tmp_path) == []


@needs_full_device
def test_a_full_disk_keeps_the_old_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write("summary.json", "old")
    (tmp_path / ".summary.json.partial").symlink_to("/dev/full")
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
        assert names(tmp_path) == [".summary.json.partial"]
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
    path = RunFolder.make(TrainConfig(run_dir=Path("run")))
    assert path == (Path("run") if processes == 1 else tmp_path / "run")
