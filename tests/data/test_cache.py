"""The cache never shows a partial file, never leaves one behind, and says why it cannot be used."""

import errno
import os
from pathlib import Path

import pytest

from bn_jax.data import DataError
from bn_jax.data.load import default_cache_dir, store


@pytest.fixture
def file(synthetic):
    return synthetic.entry.files[0]


@pytest.fixture
def content(synthetic, file):
    return synthetic.contents[file.name]


def test_what_is_stored_is_read(tmp_path, file, content):
    folder = tmp_path / "deep" / "folder"
    store(folder / file.name, content)
    assert (folder / file.name).read_bytes() == content
    assert os.listdir(folder) == [file.name]


def test_a_stored_file_has_the_permissions_of_any_new_file(tmp_path, file, content):
    store(tmp_path / file.name, content)
    (tmp_path / "any").touch()
    assert (tmp_path / file.name).stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("old", [None, b"old"])
def test_the_name_changes_only_after_all_bytes_are_on_disk(
    tmp_path, file, content, monkeypatch, old
):
    final = tmp_path / file.name
    if old is not None:
        final.write_bytes(old)
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        assert os.fstat(descriptor).st_size == len(content)
        assert (final.read_bytes() if final.exists() else None) == old
        events.append("fsync")
        real_fsync(descriptor)

    def replace(source, target):
        assert Path(source).parent == final.parent  # a rename is atomic within a file system only
        assert Path(source).read_bytes() == content
        events.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    store(tmp_path / file.name, content)
    assert events == ["fsync", "replace"]
    assert final.read_bytes() == content


def test_two_writers_never_share_a_partial_file(tmp_path, file, content, monkeypatch):
    sources = []
    monkeypatch.setattr(os, "replace", lambda source, target: sources.append(source))
    store(tmp_path / file.name, content)
    store(tmp_path / file.name, content)
    assert len(set(sources)) == 2


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_refusal_leaves_the_folder_as_it_was(
    tmp_path, file, content, monkeypatch, call, code, old
):
    if old is not None:
        (tmp_path / file.name).write_bytes(old)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(DataError) as caught:
        store(tmp_path / file.name, content)
    for part in (file.name, str(tmp_path), os.strerror(code), "BN_JAX_CACHE", "data_dir"):
        assert part in str(caught.value)
    assert os.listdir(tmp_path) == ([] if old is None else [file.name])
    assert old is None or (tmp_path / file.name).read_bytes() == old


def test_an_interrupt_leaves_the_folder_as_it_was(tmp_path, file, content, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / file.name, content)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path, file, content):
    # Below a regular file nobody can make a folder, not even root.
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Not a directory.*BN_JAX_CACHE"):
        store(tmp_path / "file" / "cache" / file.name, content)


def test_a_folder_under_the_name_of_the_file(tmp_path, file, content):
    (tmp_path / file.name).mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        store(tmp_path / file.name, content)
    assert os.listdir(tmp_path) == [file.name]


def test_the_default_place(tmp_path, monkeypatch):
    monkeypatch.setenv("BN_JAX_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.setenv("BN_JAX_CACHE", "~/there")
    assert default_cache_dir() == Path.home() / "there"
    monkeypatch.setenv("BN_JAX_CACHE", "")  # as good as not set
    assert default_cache_dir().name == "bn_jax"
    monkeypatch.delenv("BN_JAX_CACHE")
    assert default_cache_dir().name == "bn_jax"
