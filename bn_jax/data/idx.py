"""IDX, the format of MNIST: a header, then unsigned bytes in row-major order.

The header is two zero bytes, the type of the values (8: unsigned byte), the number of dimensions,
and each dimension as a big-endian integer of 32 bits.
"""

import struct

import numpy as np
from numpy.typing import NDArray


def decode_idx(data: bytes) -> NDArray[np.uint8]:
    """Decodes an IDX file whose hash is known to be right, into a read-only view of it.

    Example:
        >>> decode_idx(bytes([0, 0, 8, 1]) + bytes([0, 0, 0, 3]) + bytes([5, 0, 4]))
        array([5, 0, 4], dtype=uint8)
    """
    rank = data[3]
    shape = struct.unpack_from(f">{rank}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def encode_idx(values: NDArray[np.uint8]) -> bytes:
    """Returns the IDX file of an array: the inverse of ``decode_idx``."""
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    return header + values.tobytes()
