"""No file and no archive fills memory, and only the right bytes pass."""

import dataclasses
import gzip
import hashlib
import io
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data import DataError
from bn_jax.data.catalog import CATALOG, DataFile
from bn_jax.data.verify import GZIP_MAGIC, read_verified


def describe(content):
    return DataFile("file", len(content), hashlib.sha256(content).hexdigest())


def read(data, file):
    return read_verified(io.BufferedReader(io.BytesIO(data)), file)


@given(st.binary(max_size=200).filter(lambda b: b[:2] != GZIP_MAGIC), st.integers(0, 9))
@settings(deadline=None)
def test_the_right_bytes_pass_as_they_are_and_as_gzip(content, level):
    assert read(content, describe(content)) == content
    assert read(gzip.compress(content, level), describe(content)) == content


@given(st.integers(1, 19))
@settings(deadline=None)
def test_one_byte_too_many_inside_gzip_is_an_error(size):
    with pytest.raises(DataError, match=f"found more than {size} bytes, expected {size} bytes"):
        read(gzip.compress(bytes(size + 1)), describe(bytes(size)))


@given(st.integers(2, 40))
@settings(deadline=None)
def test_gzip_that_breaks_off_is_an_error(length):
    content = bytes(range(100))
    with pytest.raises(DataError, match=r"found damaged gzip \(.*\), expected sound gzip"):
        read(gzip.compress(content)[:length], describe(content))


def test_what_follows_the_end_of_gzip_is_an_error():
    packed = gzip.compress(b"content")
    with pytest.raises(DataError, match="damaged gzip"):
        read(packed + b"junk", describe(b"content"))
    with pytest.raises(DataError, match="found more than 7 bytes"):
        read(packed + gzip.compress(b"another member"), describe(b"content"))


def test_a_wrong_checksum_is_an_error():
    compressed = bytearray(gzip.compress(b"content"))
    compressed[-8] ^= 1
    with pytest.raises(DataError, match="damaged gzip"):
        read(bytes(compressed), describe(b"content"))


@given(st.data())
@settings(deadline=None)
def test_damage_yields_the_content_or_a_data_error_and_nothing_else(synthetic, draw):
    file = synthetic.entry.files[1]
    content = synthetic.contents[file.name]
    data = bytearray(draw.draw(st.sampled_from([content, gzip.compress(content)])))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    try:
        passed = read(bytes(data), file)
    except DataError:
        return
    assert passed == content  # gzip's header holds a date, for one, that may be anything


@pytest.mark.parametrize("form", ["raw", "gzip"])
def test_a_huge_file_does_not_fill_memory(form, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(bytes(100_000_000)) if form == "gzip" else b"")
    if form == "raw":
        os.truncate(path, 200_000_000)  # sparse: it takes no room on disk
    tracemalloc.start()
    try:
        with path.open("rb") as stream, pytest.raises(DataError, match="more than 1,000 bytes"):
            read_verified(stream, describe(bytes(1_000)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\x00"])
def test_another_size_is_an_error(synthetic, change):
    file = synthetic.entry.files[3]
    with pytest.raises(DataError, match=f"expected {file.size} bytes"):
        read(change(synthetic.contents[file.name]), file)


def test_another_hash_is_an_error_that_shows_both(synthetic, synthesize):
    file, other = synthetic.entry.files[3], synthesize(seed=1)
    with pytest.raises(DataError) as caught:
        read(other.contents[file.name], file)
    assert file.sha256 in str(caught.value)
    assert other.entry.files[3].sha256 in str(caught.value)


def test_a_file_of_another_known_data_set_is_recognized(synthetic, monkeypatch):
    # The content of a known file is not at hand, so a file is made known: same hash, other name.
    file = synthetic.entry.files[3]
    monkeypatch.setitem(CATALOG, "x", dataclasses.replace(synthetic.entry, name="known"))
    with pytest.raises(DataError, match=r"found SHA-256 \w+ \(of known\), expected"):
        read(synthetic.contents[file.name], file._replace(sha256="0" * 64))
