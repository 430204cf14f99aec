"""A folder of the user: both forms, both places, and never anything from elsewhere."""

import gzip
import re

import numpy as np
import pytest

from bn_jax.data import DataError, load
from bn_jax.data.catalog import FASHION_MNIST, MNIST
from bn_jax.data.idx import decode_idx
from bn_jax.data.sources import read_folder


def read(entry, folder):
    return list(read_folder(entry, folder))


def fill(folder, contents, form):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if form == "raw":
            (folder / name).write_bytes(content)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))


@pytest.mark.parametrize("form", ["raw", "gzip"])
@pytest.mark.parametrize("place", [".", "synthetic"])
def test_files_are_found(tmp_path, synthetic, form, place):
    fill(tmp_path / place, synthetic.contents, form)
    assert read(synthetic.entry, tmp_path) == list(synthetic.contents.values())


def test_a_sub_folder_with_the_name_of_the_data_set_comes_first(tmp_path, synthetic, synthesize):
    fill(tmp_path, synthesize(seed=1).contents, "raw")
    fill(tmp_path / "synthetic", synthetic.contents, "gzip")
    assert read(synthetic.entry, tmp_path) == list(synthetic.contents.values())


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_file_is_an_error_that_names_it(tmp_path, synthetic, missing):
    fill(tmp_path, synthetic.contents, "raw")
    name = synthetic.entry.files[missing].name
    (tmp_path / name).unlink()
    message = f"neither {name} nor {name}.gz nor synthetic.npz"
    with pytest.raises(DataError, match=message) as caught:
        read(synthetic.entry, tmp_path)
    assert str(tmp_path) in str(caught.value)


def save_npz(path, synthetic, change=lambda arrays: arrays):
    arrays = map(decode_idx, synthetic.contents.values())
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez_compressed(path, **change(dict(zip(names, arrays, strict=True))))


@pytest.mark.parametrize("place", [".", "synthetic"])
def test_an_archive_of_arrays_passes_the_same_gates(tmp_path, synthetic, place):
    """As Keras keeps MNIST: the values must be those of the files, to the bit."""
    (tmp_path / place).mkdir(exist_ok=True)
    save_npz(tmp_path / place / "synthetic.npz", synthetic)
    assert read(synthetic.entry, tmp_path) == list(synthetic.contents.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"x_train": x["x_train"] ^ (x["x_train"] == 7)}, "found SHA-256"),
        (lambda x: x | {"x_train": x["x_train"][:-1]}, "found 14,912 bytes, expected 15,696"),
        (lambda x: x | {"x_train": x["x_train"].astype(np.int64)}, "it has more than 15,696 bytes"),
        (lambda x: x | {"x_train": np.zeros(10**6, np.uint8)}, "it has more than 15,696 bytes"),
        (lambda x: x | {"x_train": np.array([{}])}, "no array x_train that can be read"),
        (lambda x: {"y_train": x["y_train"]}, "no array x_train that can be read"),
        (
            b"PK\x03\x04" + bytes(100),
            r"no array x_train that can be read \(File is not a zip file\)",
        ),
        (b"anything", r"no array x_train that can be read \(File is not a zip file\)"),
    ],
    ids=["value", "short", "wide", "long", "pickle", "missing", "cut", "junk"],
)
def test_an_archive_with_other_arrays_is_an_error(tmp_path, synthetic, change, message):
    path = tmp_path / "synthetic.npz"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        save_npz(path, synthetic, change)
    with pytest.raises(DataError, match=message) as caught:
        read(synthetic.entry, tmp_path)
    assert str(tmp_path) in str(caught.value)


def damaged(content):
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda content: content[:-1], "found 15,695 bytes, expected 15,696 bytes"),
        (lambda content: content + b"\x00", "found more than 15,696 bytes"),
        (lambda content: content + bytes(1_000_000), "found more than"),
        (lambda content: b"", "found 0 bytes"),
        (damaged, "found SHA-256"),
        (lambda content: gzip.compress(damaged(content)), "found SHA-256"),
        (lambda content: gzip.compress(content + b"\x00"), "found more than 15,696 bytes"),
        (lambda content: gzip.compress(content) + b"\x01", "damaged gzip"),
        (lambda content: gzip.compress(content)[:-1], "damaged gzip"),
    ],
)
def test_a_bad_file_is_an_error_even_beside_a_good_one(tmp_path, synthetic, bad, message):
    fill(tmp_path, synthetic.contents, "gzip")
    name = synthetic.entry.files[0].name
    (tmp_path / name).write_bytes(bad(synthetic.contents[name]))
    with pytest.raises(DataError, match=message) as caught:
        read(synthetic.entry, tmp_path)
    assert name in str(caught.value)


def test_labels_under_the_name_of_images(tmp_path, synthetic):
    fill(tmp_path, synthetic.contents, "raw")
    (tmp_path / "train-labels").replace(tmp_path / "train-images")
    with pytest.raises(DataError, match=r"train-images: found 28 bytes"):
        read(synthetic.entry, tmp_path)


def test_what_the_system_refuses_to_read_is_a_data_error(tmp_path, synthetic, monkeypatch):
    fill(tmp_path, synthetic.contents, "raw")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bn_jax.data.sources.read_verified", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        read(synthetic.entry, tmp_path)


@pytest.mark.parametrize("entry", [MNIST, FASHION_MNIST], ids=lambda entry: entry.name)
@pytest.mark.parametrize("content", [None, b"not the file"])
def test_load_falls_back_on_nothing(tmp_path, monkeypatch, entry, content):
    def never(*_, **__):
        raise AssertionError("load looked beyond data_dir")

    for way_out in ("fetch", "remote_sources", "default_cache_dir"):
        monkeypatch.setitem(load.__globals__, way_out, never)
    if content is not None:
        (tmp_path / entry.files[0].name).write_bytes(content)
    message = "found neither" if content is None else "found 12 bytes, expected 47,040,016 bytes"
    with pytest.raises(DataError, match=message):
        load(entry.name, data_dir=tmp_path)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "nowhere"))):
        load(data_dir=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("options", [{"data_dir": "~nosuch/a"}, {"cache_dir": "~nosuch/a"}])
def test_the_home_of_nobody(options):
    with pytest.raises(DataError, match=r"_dir: found ~nosuch.a, expected a folder; there is no"):
        load("mnist", **options)


def test_a_cache_in_the_home_of_nobody(monkeypatch):
    monkeypatch.setenv("BN_JAX_CACHE", "~nosuch/a")
    with pytest.raises(DataError, match="BN_JAX_CACHE: found ~nosuch/a, expected a folder"):
        load("mnist")
