"""The one gate for bytes from outside: bounded in length, decompressed, and of the right hash."""

import gzip
import hashlib
import io
import zlib

from bn_jax.data.catalog import CATALOG, DataFile

GZIP_MAGIC = b"\x1f\x8b"


class DataError(ValueError):
    """Data is missing, damaged, or not what its name promises.

    The message says which file, what was found, what was expected, and what to do about it.
    """


def read_verified(stream: io.BufferedReader, file: DataFile) -> bytes:
    """Reads a file, as it is or as gzip, and returns its bytes if they are the right ones.

    The content tells whether it is gzip, not the name: an HTTP client may already have decompressed
    a ``.gz``. Neither a file of any length nor a gzip bomb fills memory.

    Args:
        stream: to read from.
        file: what the bytes have to be, by size and SHA-256 hash.

    Raises:
        DataError: they are others, or the gzip is damaged.
        OSError: the stream cannot be read.
    """
    packed = stream.peek(2).startswith(GZIP_MAGIC)
    try:
        data = (gzip.GzipFile(fileobj=stream) if packed else stream).read(file.size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"found damaged gzip ({error}), expected sound gzip; get another copy"
        ) from error
    if len(data) != file.size:
        more = "more than " if len(data) > file.size else ""
        found, expected = f"{more}{min(len(data), file.size):,} bytes", f"{file.size:,} bytes"
    else:
        found, expected = f"SHA-256 {hashlib.sha256(data).hexdigest()}", f"SHA-256 {file.sha256}"
    if found == expected:
        return data
    # The data sets share file names and sizes: one in place of the other is a likely mistake.
    known = {f"SHA-256 {f.sha256}": entry.name for entry in CATALOG.values() for f in entry.files}
    owner = f" (of {known[found]})" if found in known else ""
    raise DataError(
        f"found {found}{owner}, expected {expected}; the file is damaged or of another data set: "
        "get another copy"
    )
