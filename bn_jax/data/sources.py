"""Where a file can come from: here a ``Folder`` and the ``Cache``; see also ``Mirror`` and ``Npm``.

A source has a name for messages, and reads one file as uncompressed bytes or says why it cannot.
The caller verifies the bytes.
"""

import functools
import io
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from bn_jax.data.catalog import DataFile
from bn_jax.data.errors import DataError, expand
from bn_jax.data.idx import encode_idx
from bn_jax.data.integrity import read_bounded, too_long, unpack
from bn_jax.files import write_whole

CACHE_VARIABLE = "BN_JAX_CACHE"


class Unavailable(OSError):
    """The whole source does not answer: asking it for another file is a waste of time."""


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
    """A folder of the user: with the files, each as it is or as ``.gz``, or one ``.npz`` archive.

    The sub-folder named after the data set comes first, because data sets share file names: a
    folder with MNIST in it and Fashion-MNIST in a sub-folder serves both.
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
            if (archive := folder / f"{self.dataset}.npz").is_file():
                return read_npz(archive, file)
        raise DataError(
            f"found neither {file.name} nor {file.name}.gz nor {self.dataset}.npz, there or in its "
            f"sub-folder {self.dataset}; put the file there or name another folder"
        )


def read_npz(path: Path, file: DataFile) -> bytes:
    """Returns one array of an archive with Keras' names, such as ``x_train``, as the IDX file.

    Raises:
        DataError: the archive is damaged or lacks the array.
        OSError: the operating system could not read it.
    """
    part = "train" if file.name.startswith("train") else "test"
    name = f"{'x' if file.kind == 'images' else 'y'}_{part}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(name)
            if member.file_size > file.gzip_limit:
                raise too_long(f"{path}: {name}", file.gzip_limit)
            return encode_idx(np.load(io.BytesIO(archive.read(member)), allow_pickle=False))
    except (DataError, OSError):
        raise
    except Exception as error:  # zipfile and numpy name no class for all that can be wrong
        raise DataError(
            f"{path}: found no array {name} that can be read ({error}), expected Keras' arrays "
            "x_train, y_train, x_test and y_test; get another copy"
        ) from error


@dataclass(frozen=True)
class Cache:
    """The files of one data set in a folder of their own, each there whole or not at all."""

    folder: Path

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        return f"the cache {self.folder}"

    def read(self, file: DataFile) -> bytes:
        """Returns the unverified file.

        Raises:
            DataError: it is too long to be this file.
            OSError: it is not there or cannot be read.
        """
        return read_bounded(self.folder / file.name, limit=file.size)

    def store(self, file: DataFile, data: bytes) -> None:
        """Stores verified bytes under the file's name, or leaves the folder as it was.

        Raises:
            DataError: the operating system refused: no permission, a full disk.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / file.name, data)
        except OSError as error:
            raise DataError(
                f"{file.name} was fetched, but {self.name} cannot hold it: {error}; make room or "
                f"give permission there, set {CACHE_VARIABLE} to another folder, or name a folder "
                "that already has the files: --data-dir DIR, or load(data_dir=DIR)"
            ) from error


def default_cache_dir() -> Path:
    """The folder named by ``BN_JAX_CACHE``, or else the operating system's place for caches.

    Raises:
        ImportError: the variable is not set, and platformdirs, which knows the place, is missing.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return expand(chosen, CACHE_VARIABLE)
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise ImportError(
            "bn_jax.data needs platformdirs to find a place for its cache: pip install "
            f"platformdirs requests rich, set {CACHE_VARIABLE} to a folder, or name a folder that "
            "has the files: data_dir"
        ) from error
    return user_cache_path("bn_jax")


@contextmanager
def transfer_bar(description: str, *, enabled: bool) -> Iterator[Callable[..., None]]:
    """Shows a live bar on standard error while the block runs, if that is a terminal.

    Yields:
        A function that updates the bar: ``total=`` bytes will come, ``advance=`` more have come.
    """
    if not enabled or sys.stderr is None or not sys.stderr.isatty():
        yield lambda **_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield functools.partial(progress.update, progress.add_task(description, total=None))
