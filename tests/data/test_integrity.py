"""No file and no archive fills memory, and only the right bytes pass."""

import dataclasses
import gzip
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data import DataError
from bn_jax.data.catalog import CATALOG
from bn_jax.data.integrity import read_bounded, unpack, verify


@given(st.binary(max_size=200), st.integers(0, 9), st.integers(0, 5))
@settings(deadline=None)
def test_unpacking_inverts_compressing(content, level, slack):
    compressed = gzip.compress(content, level)
    assert unpack(compressed, limit=len(content) + slack, file="file") == content


def test_what_is_not_gzip_passes_as_it_is():
    assert unpack(b"\x00\x00\x08\x01", limit=4, file="file") == b"\x00\x00\x08\x01"


@given(st.integers(1, 19))
@settings(deadline=None)
def test_one_byte_too_many_inside_gzip_is_an_error(limit):
    with pytest.raises(DataError, match=f"more than {limit} bytes inside gzip"):
        unpack(gzip.compress(bytes(limit + 1)), limit=limit, file="file")


def test_a_gzip_bomb_does_not_fill_memory():
    bomb = gzip.compress(bytes(100_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than 1,000 bytes"):
            unpack(bomb, limit=1_000, file="file")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What is left to read of the stream, 97 kB here, is kept; a hundred million zeros are not.
    assert peak < 4 * len(bomb)


@given(st.integers(2, 40))
@settings(deadline=None)
def test_gzip_that_breaks_off_is_an_error(length):
    with pytest.raises(DataError, match="breaks off"):
        unpack(gzip.compress(bytes(range(100)))[:length], limit=100, file="file")


@pytest.mark.parametrize("rest", [b"\x00", b"junk", gzip.compress(b"another member", mtime=0)])
def test_bytes_after_the_end_of_gzip_are_an_error(rest):
    with pytest.raises(DataError, match=f"found {len(rest)} bytes after the end"):
        unpack(gzip.compress(b"content") + rest, limit=100, file="file")


def test_a_wrong_checksum_is_an_error():
    compressed = bytearray(gzip.compress(b"content"))
    compressed[-8] ^= 1
    with pytest.raises(DataError, match="damaged gzip"):
        unpack(bytes(compressed), limit=7, file="file")


@given(st.data())
@settings(deadline=None)
def test_damage_yields_the_content_or_a_data_error_and_nothing_else(synthetic, draw):
    file = synthetic.entry.train_labels
    content = synthetic.contents[file.name]
    data = bytearray(draw.draw(st.sampled_from([content, gzip.compress(content)])))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    try:
        passed = verify(unpack(bytes(data), limit=file.size, file="file"), file)
    except DataError:
        return
    assert passed == content  # gzip's header holds a date, for one, that may be anything


@pytest.mark.parametrize("length", [0, 9, 10])
def test_reading_up_to_the_limit(tmp_path, length):
    path = tmp_path / "file"
    path.write_bytes(bytes(length))
    assert read_bounded(path, limit=10) == bytes(length)


def test_a_file_longer_than_the_limit_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(11))
    with pytest.raises(DataError, match="file: found more than 10 bytes"):
        read_bounded(path, limit=10)


def test_a_huge_file_does_not_fill_memory(tmp_path):
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 200_000_000)  # sparse: it takes no room on disk
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than 1,000 bytes"):
            read_bounded(path, limit=1_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\x00"])
def test_another_size_is_an_error(synthetic, change):
    file = synthetic.entry.test_labels
    with pytest.raises(DataError, match=f"expected {file.size} bytes"):
        verify(change(synthetic.contents[file.name]), file)


def test_another_hash_is_an_error_that_shows_both(synthetic, synthesize):
    file = synthetic.entry.test_labels
    other = synthesize(seed=1)
    with pytest.raises(DataError) as caught:
        verify(other.contents[file.name], file)
    assert file.sha256 in str(caught.value)
    assert other.entry.test_labels.sha256 in str(caught.value)


def test_a_file_of_another_known_data_set_is_recognized(synthetic):
    # The content of a known file is not at hand, so a file is made known: same hash, other name.
    file = synthetic.entry.test_labels
    content = synthetic.contents[file.name]
    expected = dataclasses.replace(file, sha256="0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bn_jax.data.integrity.CATALOG", dict(CATALOG) | {"x": synthetic.entry})
        with pytest.raises(DataError, match="of synthetic's test-labels"):
            verify(content, expected)
