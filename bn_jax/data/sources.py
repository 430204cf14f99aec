"""Where a file can come from: a ``Folder``, a ``Cache``, a ``Mirror``, ``Npm``.

A source has a name for messages and reads one file as uncompressed bytes, or says why it cannot. It
need not be honest or whole: whoever asks it verifies the bytes. Here stand the contract and the
simplest source; ``cache.py``, ``mirror.py`` and ``npm.py`` hold the others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bn_jax.data.catalog import DataFile
from bn_jax.data.errors import DataError
from bn_jax.data.integrity import read_bounded, unpack


class Unavailable(OSError):
    """The whole source does not answer, so asking it for another file is a waste of time."""


class Source(Protocol):
    """A place that may have the files."""

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        ...

    def read(self, file: DataFile) -> bytes:
        """Returns the uncompressed, unverified bytes of ``file``.

        Raises:
            DataError: what the source has is not this file.
            Unavailable: the source can give no file at all.
            OSError: the source could not give this file.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """A folder of the user, with the files as they are or as ``.gz``.

    The sub-folder named after the data set comes first, because data sets share file names:
    a folder with MNIST in it and Fashion-MNIST in a sub-folder serves both.
    """

    path: Path
    dataset: str

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        return f"the folder {self.path}"

    def read(self, file: DataFile) -> bytes:
        """Returns the bytes of the first candidate that exists.

        Raises:
            DataError: there is no candidate, or the first one is not this file.
            OSError: the operating system could not read it.
        """
        for folder in (self.path / self.dataset, self.path):
            for candidate in (folder / file.name, folder / f"{file.name}.gz"):
                if candidate.is_file():
                    data = read_bounded(candidate, limit=file.gzip_limit)
                    return unpack(data, limit=file.size, file=str(candidate))
        raise DataError(
            f"found neither {file.name} nor {file.name}.gz, there or in its sub-folder "
            f"{self.dataset}; put the file there or name another folder"
        )
