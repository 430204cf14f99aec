"""The cache: verified files in a folder, under their final names only when whole.

Two processes that fetch the same file replace it by the same bytes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from bn_jax.data.catalog import DataFile
from bn_jax.data.errors import DataError, expand
from bn_jax.data.integrity import read_bounded
from bn_jax.files import write_whole

CACHE_VARIABLE = "BN_JAX_CACHE"


def default_cache_dir() -> Path:
    """The folder named by ``BN_JAX_CACHE``, or else the operating system's place for caches.

    Raises:
        ImportError: the variable is not set, and pooch, which knows the place, is not installed.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return expand(chosen, CACHE_VARIABLE)
    try:
        from pooch import os_cache
    except ImportError as error:
        raise ImportError(
            "bn_jax.data needs pooch to find a place for its cache: pip install pooch rich, "
            f"set {CACHE_VARIABLE} to a folder, or name a folder that has the files: data_dir"
        ) from error
    return Path(os_cache("bn_jax"))


@dataclass(frozen=True)
class Cache:
    """The files of one data set in a folder of their own."""

    folder: Path

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        return f"the cache {self.folder}"

    def read(self, file: DataFile) -> bytes:
        """Returns what stands under the file's name, unverified.

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
