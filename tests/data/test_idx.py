"""The decoder inverts the encoder, and its arrays are read-only."""

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data.idx import decode_idx, encode_idx


@given(numpy_strategies.arrays(np.uint8, numpy_strategies.array_shapes(max_dims=3)))
@settings(deadline=None)
def test_decoding_inverts_encoding(values):
    decoded = decode_idx(encode_idx(values))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, values, strict=True)


@given(st.lists(st.integers(0, 9), max_size=3))
@settings(deadline=None)
def test_the_format_is_the_one_that_the_world_knows(labels):
    data = encode_idx(np.array(labels, np.uint8))
    assert data == bytes([0, 0, 8, 1, 0, 0, 0, len(labels), *labels])


def test_the_array_cannot_be_written_to():
    decoded = decode_idx(encode_idx(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match="read-only"):
        decoded[0] = 1
