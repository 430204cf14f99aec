"""Bytes from outside: never more of them than promised, and in the end exactly those promised.

Three gates, in the order in which bytes pass them: ``read_bounded`` (a file of any length must not
fill memory), ``unpack`` (nor may a gzip bomb), ``verify`` (size and SHA-256).
"""

import hashlib
import zlib
from pathlib import Path

from bn_jax.data.catalog import CATALOG, DataFile
from bn_jax.data.errors import unexpected

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
        raise unexpected(
            str(path),
            found=f"more than {limit:,} bytes",
            expected="no more than that",
            remedy="this is another file: get another copy",
        )
    return data


def unpack(data: bytes, *, limit: int, file: str) -> bytes:
    """Decompresses what is gzip, and passes on what is not.

    The content decides, not the name: an HTTP client may already have decompressed a ``.gz``, and
    no IDX or tar file begins with gzip's magic number.

    Args:
        data: a gzip file of one member, or anything else.
        limit: decompression ends with an error after this many bytes and allocates no more.
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
    another_copy = "the file is damaged: get another copy"
    try:
        content = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise unexpected(
            file, found=f"damaged gzip ({error})", expected="sound gzip", remedy=another_copy
        ) from error
    if len(content) > limit:
        raise unexpected(
            file,
            found=f"more than {limit:,} bytes inside gzip",
            expected="no more than that",
            remedy="this is another file: get another copy",
        )
    if not stream.eof:
        raise unexpected(
            file, found="gzip that breaks off", expected="its end", remedy=another_copy
        )
    if stream.unused_data:
        raise unexpected(
            file,
            found=f"{len(stream.unused_data):,} bytes after the end of gzip",
            expected="none",
            remedy=another_copy,
        )
    return content


def verify(data: bytes, file: DataFile) -> bytes:
    """Returns ``data`` if it is, to the last bit, what the catalog says of ``file``.

    Raises:
        DataError: the size or the SHA-256 differs.
    """
    if len(data) != file.size:
        raise unexpected(
            file.name,
            found=f"{len(data):,} bytes",
            expected=f"{file.size:,} bytes",
            remedy="the file is incomplete or of another data set: get another copy",
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        # The data sets share file names and sizes: one in place of the other is a likely mistake.
        known = {
            known.sha256: f" (of {entry.name}'s {known.name})"
            for entry in CATALOG.values()
            for known in entry.files
        }
        raise unexpected(
            file.name,
            found=f"SHA-256 {digest}{known.get(digest, '')}",
            expected=file.sha256,
            remedy="the file is damaged or of another data set: get another copy",
        )
    return data
