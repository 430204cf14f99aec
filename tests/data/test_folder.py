"""A folder of the user: both forms, both places, and never anything from elsewhere."""

import gzip
import re

import numpy as np
import pytest

from bn_jax.data import DataError, load
from bn_jax.data.catalog import FASHION_MNIST, MNIST
from bn_jax.data.load import decode, read_folder


def fill(folder, contents, form):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if form == "raw":
            (folder / name).write_bytes(content)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))


@pytest.mark.parametrize("form", ["raw", "gzip"])
@pytest.mark.parametrize("place", [".", "synthetic"])
def test_files_are_found_and_decoded(tmp_path, synthetic, form, place):
    fill(tmp_path / place, synthetic.contents, form)
    dataset = decode(synthetic.entry, read_folder(synthetic.entry, tmp_path))
    for values, content in zip(dataset, synthetic.contents.values(), strict=True):
        assert content.endswith(values.tobytes())
    assert dataset.train_images.shape == (20, 28, 28)
    assert dataset.test_labels.shape == (5,)
    assert all(values.dtype == np.uint8 for values in dataset)


def test_a_sub_folder_with_the_name_of_the_data_set_comes_first(tmp_path, synthetic, synthesize):
    fill(tmp_path, synthesize(seed=1).contents, "raw")
    fill(tmp_path / "synthetic", synthetic.contents, "gzip")
    assert read_folder(synthetic.entry, tmp_path) == list(synthetic.contents.values())


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_file_is_an_error_that_names_it(tmp_path, synthetic, missing):
    fill(tmp_path, synthetic.contents, "raw")
    name = synthetic.entry.files[missing].name
    (tmp_path / name).unlink()
    with pytest.raises(
        DataError, match=f"neither {name} nor {name}.gz nor synthetic.npz"
    ) as caught:
        read_folder(synthetic.entry, tmp_path)
    assert str(tmp_path) in str(caught.value)


def save_npz(path, synthetic, change=lambda arrays: arrays):
    arrays = decode(synthetic.entry, list(synthetic.contents.values()))
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez_compressed(path, **change(dict(zip(names, arrays, strict=True))))


@pytest.mark.parametrize("place", [".", "synthetic"])
def test_an_archive_of_arrays_passes_the_same_gates(tmp_path, synthetic, place):
    """As Keras keeps MNIST: the values must be those of the files, to the bit."""
    (tmp_path / place).mkdir(exist_ok=True)
    save_npz(tmp_path / place / "synthetic.npz", synthetic)
    assert read_folder(synthetic.entry, tmp_path) == list(synthetic.contents.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"x_train": x["x_train"] ^ (x["x_train"] == 7)}, "found SHA-256"),
        (lambda x: x | {"x_train": x["x_train"][:-1]}, "found 14,912 bytes, expected 15,696"),
        (lambda x: x | {"x_train": x["x_train"].astype(np.int64)}, "x_train.npy: found more than"),
        (lambda x: x | {"x_train": np.zeros(10**6, np.uint8)}, "x_train.npy: found more than"),
        (lambda x: x | {"x_train": np.array([{}])}, "no array x_train.npy that can be read"),
        (lambda x: {"y_train": x["y_train"]}, "no array x_train.npy that can be read"),
        (None, "no array x_train.npy that can be read"),
    ],
    ids=["value", "short", "wide", "bomb", "pickle", "missing", "junk"],
)
def test_an_archive_with_other_arrays_is_an_error(tmp_path, synthetic, change, message):
    path = tmp_path / "synthetic.npz"
    if change is None:
        path.write_bytes(b"PK\x03\x04" + bytes(100))
    else:
        save_npz(path, synthetic, change)
    with pytest.raises(DataError, match=message) as caught:
        read_folder(synthetic.entry, tmp_path)
    assert str(tmp_path) in str(caught.value)


def damaged(content):
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda content: content[:-1], "found 15,695 bytes, expected 15,696 bytes"),
        (lambda content: content + b"\x00", "found 15,697 bytes"),
        (lambda content: content + bytes(1_000_000), "found more than"),
        (lambda content: b"", "found 0 bytes"),
        (damaged, "found SHA-256"),
        (lambda content: gzip.compress(damaged(content)), "found SHA-256"),
        (lambda content: gzip.compress(content + b"\x00"), "inside gzip"),
        (lambda content: gzip.compress(content) + b"\x00", "after the end of gzip"),
        (lambda content: gzip.compress(content)[:-1], "breaks off"),
    ],
)
def test_a_bad_file_is_an_error_even_beside_a_good_one(tmp_path, synthetic, bad, message):
    fill(tmp_path, synthetic.contents, "gzip")
    name = synthetic.entry.train_images.name
    (tmp_path / name).write_bytes(bad(synthetic.contents[name]))
    with pytest.raises(DataError, match=message) as caught:
        read_folder(synthetic.entry, tmp_path)
    assert name in str(caught.value)


def test_labels_under_the_name_of_images(tmp_path, synthetic):
    fill(tmp_path, synthetic.contents, "raw")
    (tmp_path / "train-labels").replace(tmp_path / "train-images")
    with pytest.raises(DataError, match="train-images: found 28 bytes"):
        read_folder(synthetic.entry, tmp_path)


def test_what_the_system_refuses_to_read_is_a_data_error(tmp_path, synthetic, monkeypatch):
    fill(tmp_path, synthetic.contents, "raw")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bn_jax.data.sources.read_bounded", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        read_folder(synthetic.entry, tmp_path)


@pytest.mark.parametrize("entry", [MNIST, FASHION_MNIST], ids=lambda entry: entry.name)
@pytest.mark.parametrize("content", [None, b"not the file"])
def test_load_falls_back_on_nothing(tmp_path, monkeypatch, entry, content):
    def never(*_, **__):
        raise AssertionError("load looked beyond data_dir")

    for way_out in ("fetch", "Mirror", "Npm", "default_cache_dir"):
        monkeypatch.setitem(load.__globals__, way_out, never)
    if content is not None:
        (tmp_path / entry.train_images.name).write_bytes(content)
    message = "found neither" if content is None else "found 12 bytes, expected 47,040,016 bytes"
    with pytest.raises(DataError, match=message):
        load(entry.name, data_dir=tmp_path)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "nowhere"))):
        load(data_dir=str(tmp_path / "nowhere"))


def test_a_label_for_each_image(synthetic, synthesize):
    other = synthesize(train=21, test=5)
    train_images, _, test_images, test_labels = synthetic.contents.values()
    with pytest.raises(DataError, match="train-labels: found 21 labels, expected 20"):
        decode(
            synthetic.entry,
            [train_images, other.contents["train-labels"], test_images, test_labels],
        )
    other = synthesize(train=20, test=4)
    with pytest.raises(DataError, match="test-labels: found 4 labels, expected 5"):
        decode(
            synthetic.entry,
            [*list(synthetic.contents.values())[:3], other.contents["test-labels"]],
        )


@pytest.mark.parametrize("options", [{"data_dir": "~nosuch/a"}, {"cache_dir": "~nosuch/a"}])
def test_the_home_of_nobody(options):
    with pytest.raises(DataError, match=r"_dir: found ~nosuch.a, expected a folder; there is no"):
        load("mnist", **options)


def test_a_cache_in_the_home_of_nobody(monkeypatch):
    monkeypatch.setenv("BN_JAX_CACHE", "~nosuch/a")
    with pytest.raises(DataError, match="BN_JAX_CACHE: found ~nosuch/a, expected a folder"):
        load("mnist")
