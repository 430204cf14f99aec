"""A file that is there whole or not at all, whatever ends the process that writes it."""

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write under another name, to the disk, and rename.

    A reader, a second process or a machine that lost power sees the old file or the new one. A
    killed process can leave a hidden ``*.partial`` behind, which nothing ever reads.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    # Not tempfile: its files are private (mode 0600), and a folder may be shared. An exclusive
    # open does not follow a link, and a name that nobody can guess is nobody else's.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:  # an interrupt from the keyboard must not leave it either
        with contextlib.suppress(OSError):
            partial.unlink()
