"""Three gates for bytes from outside, in the order in which the bytes pass them.

``read_bounded``: a file of any length must not fill memory. ``unpack``: nor may a gzip bomb.
``verify``: the bytes have the size and the SHA-256 hash that the catalog gives.
"""

import hashlib
import zlib
from pathlib import Path

from bn_jax.data.catalog import CATALOG, DataFile
from bn_jax.data.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
# zlib's code for "a gzip header and trailer, and the largest window".
GZIP_WINDOW_BITS = 16 + zlib.MAX_WBITS


def read_bounded(path: Path, *, limit: int) -> bytes:
    """Reads a file that must not be longer than ``limit`` bytes.

    Raises:
        DataError: the file is longer.
        OSError: the operating system could not read it.
    """
    with path.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise too_long(str(path), limit)
    return data


def too_long(file: str, limit: int, where: str = "") -> DataError:
    """The error for more than ``limit`` bytes."""
    return DataError(
        f"{file}: found more than {limit:,} bytes{where}, expected no more than that; this is "
        "another file: get another copy"
    )


def unpack(data: bytes, *, limit: int, file: str) -> bytes:
    """Decompresses gzip; returns anything else as it is.

    The content decides, not the name: an HTTP client may already have decompressed a ``.gz``, and
    no IDX or tar file begins with gzip's magic number.

    Args:
        data: a gzip file of one member, or anything else.
        limit: the longest content; decompression stops there.
        file: what to call the data in error messages.

    Raises:
        DataError: the gzip stream is damaged, cut short, followed by more bytes, or too long.

    Example:
        >>> import gzip
        >>> unpack(gzip.compress(b"abc"), limit=3, file="letters")
        b'abc'
        >>> unpack(gzip.compress(b"a" * 1_000_000), limit=3, file="letters")
        Traceback (most recent call last):
        bn_jax.data.errors.DataError: letters: found more than 3 bytes inside gzip, ...
    """
    if not data.startswith(GZIP_MAGIC):
        return data
    stream = zlib.decompressobj(GZIP_WINDOW_BITS)
    try:
        content = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise DataError(
            f"{file}: found damaged gzip ({error}), expected sound gzip; get another copy"
        ) from error
    if len(content) > limit:
        raise too_long(file, limit, " inside gzip")
    if stream.eof and not stream.unused_data:
        return content
    found = "gzip that breaks off"
    if stream.eof:
        found = f"{len(stream.unused_data):,} bytes after the end of gzip"
    raise DataError(f"{file}: found {found}, expected sound gzip; get another copy")


def verify(data: bytes, file: DataFile) -> bytes:
    """Returns ``data`` if it has the size and the hash that the catalog gives for ``file``.

    Raises:
        DataError: the size or the SHA-256 differs.
    """
    remedy = "the file is damaged or of another data set: get another copy"
    if len(data) != file.size:
        raise DataError(
            f"{file.name}: found {len(data):,} bytes, expected {file.size:,} bytes; {remedy}"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest == file.sha256:
        return data
    # The data sets share file names and sizes: one in place of the other is a likely mistake.
    owners = [
        f" (of {entry.name}'s {known.name})"
        for entry in CATALOG.values()
        for known in entry.files
        if known.sha256 == digest
    ]
    raise DataError(
        f"{file.name}: found SHA-256 {digest}{''.join(owners[:1])}, expected {file.sha256}; "
        f"{remedy}"
    )
