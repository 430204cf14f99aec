"""Files that are there whole or not at all, and locks that end with the process that holds them."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # Windows


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


@contextlib.contextmanager
def locked(path: Path, taken: str = "", create: bool = False) -> Iterator[None]:
    """Keep a folder or a file, perhaps a new one, locked: no second process gets past here.

    Where the system or its file system has no such locks, as some over a network, nothing is.

    Raises:
        BlockingIOError: another process has it locked; with the message `taken`.
    """
    if fcntl is None:
        yield
        return
    # A folder may be a link. A new file, in a place that others can write to, must not be theirs.
    handle = os.open(path, os.O_RDONLY | create * (os.O_CREAT | os.O_NOFOLLOW), 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(taken or str(error)) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
