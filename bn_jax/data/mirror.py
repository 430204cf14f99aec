"""A public web server that has the files, over HTTPS."""

import io
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bn_jax.data.catalog import DataFile
from bn_jax.data.errors import unexpected
from bn_jax.data.integrity import unpack
from bn_jax.data.progress import transfer_bar
from bn_jax.data.sources import Unavailable

CONNECT_SECONDS = 10.0
# Between two pieces of an answer, not for the whole of it: a slow line may take its time.
READ_SECONDS = 30.0


class _BoundedBuffer(io.BytesIO):
    """Memory for a download that must not be longer than ``limit`` bytes."""

    def __init__(self, limit: int, file: str):
        super().__init__()
        self.limit = limit
        self.file = file

    def write(self, piece, /) -> int:
        if self.tell() + len(piece) > self.limit:
            raise unexpected(
                self.file,
                found=f"a download of more than {self.limit:,} bytes",
                expected="no more than that",
                remedy="the server sends another file: use another source",
            )
        return super().write(piece)


@dataclass(frozen=True)
class Mirror:
    """A web server that has each file as ``url`` + name + ``.gz``."""

    url: str
    progress: bool = False
    connect_seconds: float = CONNECT_SECONDS
    read_seconds: float = READ_SECONDS

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        return f"the mirror {self.url}"

    def read(self, file: DataFile) -> bytes:
        """Downloads one file into memory and decompresses it.

        Raises:
            DataError: the server sent something else.
            Unavailable: the server cannot be reached, or pooch is not installed.
            OSError: the server answered, but not with the file.
        """
        try:
            from pooch import HTTPDownloader
        except ImportError as error:
            raise Unavailable("pooch is not installed: pip install pooch rich") from error
        url = f"{self.url}{file.name}.gz"
        buffer = _BoundedBuffer(file.gzip_limit, url)
        with transfer_bar(file.name, enabled=self.progress) as bar, ExitStack() as responses:
            # After an error pooch leaves the connection open, for the garbage collector to find.
            def close_at_the_end(response, **_):
                responses.callback(response.close)

            # Any object with the methods of a bar will do, but pooch's signature does not say so.
            progressbar: Any = bar or False
            download = HTTPDownloader(
                progressbar=progressbar,
                chunk_size=1 << 16,
                timeout=(self.connect_seconds, self.read_seconds),
                hooks={"response": close_at_the_end},
            )
            try:
                download(url, buffer, None)
            except OSError as error:
                if getattr(error, "response", None) is not None:
                    raise  # an answer, such as "404 Not Found": other files may be there
                # urllib3 wraps the reason in a message about its own retries.
                reason = getattr(error.args[0], "reason", error) if error.args else error
                raise Unavailable(f"no connection: {reason}") from error
        return unpack(buffer.getvalue(), limit=file.size, file=url)
