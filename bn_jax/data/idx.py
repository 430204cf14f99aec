"""IDX, the format of MNIST: a big-endian header, then unsigned bytes in row-major order.

    images:  magic 2051 | count | rows | columns | count * rows * columns bytes
    labels:  magic 2049 | count | count bytes

Every number of the header has 32 bits. The decoder refuses a file whose length is not exactly what
the header says.
"""

import math
import struct
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bn_jax.data.errors import DataError

Kind = Literal["images", "labels"]

# Two zero bytes, the type of the values (8: unsigned byte), the number of dimensions.
MAGIC: dict[Kind, int] = {"images": 0x0803, "labels": 0x0801}
CLASSES = 10


def decode_idx(
    data: bytes,
    *,
    kind: Kind,
    image_size: tuple[int, int] | None = (28, 28),
    file: str = "IDX data",
) -> NDArray[np.uint8]:
    """Decodes one uncompressed IDX file of images or of labels.

    Args:
        data: the whole file.
        kind: what the file has to hold: images or labels.
        image_size: the rows and columns that images must have; ``None`` accepts any.
        file: what to call the data in error messages.

    Returns:
        ``uint8[count, rows, columns]`` for images, ``uint8[count]`` with values 0 to 9 for labels.
        The array is a read-only view of ``data``; ``.copy()`` makes one to write to.

    Raises:
        DataError: the magic number is of another kind of file, a dimension is zero, images have
            another size, a label is above 9, or the file is shorter or longer than its header says.

    Example:
        >>> three_labels = bytes([0, 0, 8, 1]) + bytes([0, 0, 0, 3]) + bytes([5, 0, 4])
        >>> decode_idx(three_labels, kind="labels")
        array([5, 0, 4], dtype=uint8)
        >>> decode_idx(three_labels[:-1], kind="labels")
        Traceback (most recent call last):
        bn_jax.data.errors.DataError: IDX data: found 10 bytes, expected 11 bytes ...
    """
    header = struct.Struct(f">{1 + (MAGIC[kind] & 0xFF)}I")
    if len(data) < header.size:
        raise DataError(
            f"{file}: found {len(data)} bytes, expected a header of {header.size} bytes; the file "
            "is cut short: get another copy"
        )
    magic, *shape = header.unpack_from(data)
    if magic != MAGIC[kind]:
        raise DataError(
            f"{file}: found magic number {magic}, expected {MAGIC[kind]}, the magic number of "
            f"{kind}; this is another kind of file: was it renamed, or left compressed?"
        )
    if 0 in shape:
        raise DataError(
            f"{file}: found dimensions {shape}, expected at least 1 in each; the file is empty or "
            "damaged: get another copy"
        )
    if kind == "images" and image_size is not None and tuple(shape[1:]) != image_size:
        raise DataError(
            f"{file}: found images of {shape[1]} x {shape[2]}, expected {image_size[0]} x "
            f"{image_size[1]}; this is another data set: get the right one"
        )
    # Python's integers do not overflow, so no header passes by the accident of large numbers.
    size = header.size + math.prod(shape)
    if len(data) != size:
        raise DataError(
            f"{file}: found {len(data)} bytes, expected {size} bytes for dimensions {shape}; the "
            "file is cut short or has something appended: get another copy"
        )
    values = np.frombuffer(data, np.uint8, offset=header.size).reshape(shape)
    if kind == "labels" and values.max() >= CLASSES:
        first = int(np.argmax(values >= CLASSES))
        raise DataError(
            f"{file}: found label {values[first]} at index {first}, expected labels from 0 to "
            f"{CLASSES - 1}; the file is damaged or of another data set: get another copy"
        )
    return values


def encode_idx(values: NDArray[np.uint8]) -> bytes:
    """The IDX file of images or labels: the inverse of ``decode_idx``."""
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    return header + values.tobytes()
