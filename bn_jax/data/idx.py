"""IDX, the format of MNIST: a big-endian header, then unsigned bytes in row-major order.

    images:  magic 2051 | count | rows | columns | count * rows * columns bytes
    labels:  magic 2049 | count | count bytes

Every number is 32 bits. The decoder believes nothing: what the header promises has to be there, to
the byte.
"""

import math
import struct
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bn_jax.data.errors import unexpected

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
        kind: what the file has to hold.
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
    dimensions = MAGIC[kind] & 0xFF
    header = struct.Struct(f">{1 + dimensions}I")
    if len(data) < header.size:
        raise unexpected(
            file,
            found=f"{len(data)} bytes",
            expected=f"a header of {header.size} bytes",
            remedy="the file is cut short: get another copy",
        )
    magic, *shape = header.unpack_from(data)
    if magic != MAGIC[kind]:
        raise unexpected(
            file,
            found=f"magic number {magic}",
            expected=f"{MAGIC[kind]}, the magic number of {kind}",
            remedy="this is another kind of file: was it renamed, or left compressed?",
        )
    if 0 in shape:
        raise unexpected(
            file,
            found=f"dimensions {shape}",
            expected="at least 1 in each",
            remedy="the file is empty or damaged: get another copy",
        )
    if kind == "images" and image_size is not None and tuple(shape[1:]) != image_size:
        raise unexpected(
            file,
            found=f"images of {shape[1]} x {shape[2]}",
            expected=f"{image_size[0]} x {image_size[1]}",
            remedy="this is another data set: get the right one",
        )
    # Python's integers do not overflow, so no header passes by the accident of large numbers.
    size = header.size + math.prod(shape)
    if len(data) != size:
        raise unexpected(
            file,
            found=f"{len(data)} bytes",
            expected=f"{size} bytes for dimensions {shape}",
            remedy="the file is cut short or has something appended: get another copy",
        )
    values = np.frombuffer(data, np.uint8, offset=header.size).reshape(shape)
    if kind == "labels" and values.max() >= CLASSES:
        first = int(np.argmax(values >= CLASSES))
        raise unexpected(
            file,
            found=f"label {values[first]} at index {first}",
            expected=f"labels from 0 to {CLASSES - 1}",
            remedy="the file is damaged or of another data set: get another copy",
        )
    return values
