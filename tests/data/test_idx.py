"""The decoder inverts the encoder, and no lie in a header gets past it."""

import gzip

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data import DataError
from bn_jax.data.idx import decode_idx

side = st.integers(1, 5)
images = st.tuples(side, side, side).flatmap(
    lambda shape: numpy_strategies.arrays(np.uint8, shape, elements=st.integers(0, 255))
)
labels = side.flatmap(
    lambda count: numpy_strategies.arrays(np.uint8, (count,), elements=st.integers(0, 9))
)


def kind_of(values):
    return "images" if values.ndim == 3 else "labels"


def decode(data, kind):
    return decode_idx(data, kind=kind, image_size=None)


@given(images | labels)
@settings(deadline=None)
def test_decoding_inverts_encoding(encode_idx, values):
    decoded = decode(encode_idx(values), kind_of(values))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, values, strict=True)


@given(images | labels, st.data())
@settings(deadline=None)
def test_any_other_header_is_an_error(encode_idx, values, draw):
    data = bytearray(encode_idx(values))
    position = draw.draw(st.integers(0, 4 + 4 * values.ndim - 1))
    data[position] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(DataError):
        decode(bytes(data), kind_of(values))


@given(images | labels, st.data())
@settings(deadline=None)
def test_any_shorter_file_is_an_error(encode_idx, values, draw):
    data = encode_idx(values)
    length = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(DataError, match=f"found {length} bytes"):
        decode(data[:length], kind_of(values))


@given(images | labels, st.binary(min_size=1, max_size=9))
@settings(deadline=None)
def test_any_longer_file_is_an_error(encode_idx, values, rest):
    with pytest.raises(DataError, match="something appended"):
        decode(encode_idx(values) + rest, kind_of(values))


@given(labels, st.data())
@settings(deadline=None)
def test_any_label_above_nine_is_an_error_that_says_where(encode_idx, values, draw):
    position = draw.draw(st.integers(0, len(values) - 1))
    values[position] = draw.draw(st.integers(10, 255))
    with pytest.raises(DataError, match=f"found label {values[position]} at index {position}"):
        decode(encode_idx(values), "labels")


@given(st.binary(max_size=40), st.sampled_from(["images", "labels"]))
@settings(deadline=None)
def test_junk_is_a_data_error_and_never_another(data, kind):
    try:
        decoded = decode(data, kind)
    except DataError:
        return
    assert decoded.size < len(data)


@pytest.mark.parametrize("shape", [(0, 28, 28), (3, 0, 28), (3, 28, 0), (0,)])
def test_a_dimension_of_zero_is_an_error(encode_idx, shape):
    values = np.zeros(shape, np.uint8)
    with pytest.raises(DataError, match="at least 1"):
        decode(encode_idx(values), kind_of(values))


def test_dimensions_whose_product_overflows_64_bits_are_an_error():
    # 2^16 · 2^24 · 2^24 = 2^64, which is 0 in 64 bits: exactly the bytes that follow the header.
    header = b"".join(n.to_bytes(4, "big") for n in (2051, 1 << 16, 1 << 24, 1 << 24))
    with pytest.raises(DataError, match="expected 18446744073709551632 bytes"):
        decode(header, "images")


def test_labels_under_the_name_of_images(encode_idx):
    data = encode_idx(np.zeros(100, np.uint8))
    with pytest.raises(DataError, match=r"^t10k: found magic number 2049, expected 2051"):
        decode_idx(data, kind="images", file="t10k")


def test_images_under_the_name_of_labels(encode_idx):
    data = encode_idx(np.zeros((1, 28, 28), np.uint8))
    with pytest.raises(DataError, match="found magic number 2051, expected 2049"):
        decode_idx(data, kind="labels")


def test_a_file_that_is_still_compressed(encode_idx):
    data = gzip.compress(encode_idx(np.zeros((1, 28, 28), np.uint8)))
    with pytest.raises(DataError, match="left compressed"):
        decode_idx(data, kind="images")


@pytest.mark.parametrize("shape", [(1, 27, 28), (1, 28, 27), (1, 14, 56)])
def test_images_of_another_size(encode_idx, shape):
    data = encode_idx(np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match=f"found images of {shape[1]} x {shape[2]}"):
        decode_idx(data, kind="images")
    assert decode_idx(data, kind="images", image_size=None).shape == shape
    assert decode_idx(data, kind="images", image_size=shape[1:]).shape == shape


def test_the_array_cannot_be_written_to(encode_idx):
    decoded = decode_idx(encode_idx(np.zeros(3, np.uint8)), kind="labels")
    with pytest.raises(ValueError, match="read-only"):
        decoded[0] = 1


def test_a_data_error_is_a_value_error():
    with pytest.raises(ValueError, match="a header of 8 bytes"):
        decode_idx(b"", kind="labels")
