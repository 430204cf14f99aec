"""From sources to verified bytes: the first that has the file wins, the cache keeps it."""

import logging
from collections.abc import Sequence

from bn_jax.data.cache import Cache
from bn_jax.data.catalog import CatalogEntry, DataFile
from bn_jax.data.errors import DataError
from bn_jax.data.integrity import verify
from bn_jax.data.sources import Source, Unavailable

logger = logging.getLogger(__name__)


def fetch(entry: CatalogEntry, cache: Cache, sources: Sequence[Source]) -> list[bytes]:
    """Returns the four files of a data set, verified, from the cache or else from the sources.

    What the cache lacks, or has in a damaged state, is asked of each source in turn and stored. A
    source that does not answer at all is not asked again.

    Args:
        entry: which data set.
        cache: asked first; receives what comes from elsewhere.
        sources: asked in this order.

    Returns:
        The uncompressed files, in the order of ``entry.files``.

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
            # Wrong bytes are more than an absence: that disk or server may need a look.
            logger.warning("%s: %s. Fetching it from elsewhere.", source.name, error)
        else:
            if source is not cache:
                logger.info("Got %s from %s.", file.name, source.name)
                cache.store(file, data)
            return data
    names = ", ".join(each.name for each in entry.files)
    raise DataError(
        f"{file.name} of {entry.name} is nowhere to be had:\n"
        + "".join(f"  - {source}: {reason}\n" for source, reason in failures.items())
        + f"With a copy of the files ({names}; as they are or as .gz), name their folder: "
        f"--data-dir DIR on the command line, load({entry.name!r}, data_dir=DIR) in Python."
        + (f" {entry.hint}" if entry.hint else "")
    )
