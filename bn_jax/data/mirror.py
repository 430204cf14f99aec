"""A public web server that has the files, over HTTPS."""

import io
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bn_jax.data.catalog import DataFile
from bn_jax.data.errors import DataError, unexpected
from bn_jax.data.integrity import unpack
from bn_jax.data.progress import transfer_bar
from bn_jax.data.sources import Unavailable

CONNECT_SECONDS = 10.0
# Between two pieces of an answer: a slow line may take its time, but not for ever.
READ_SECONDS = 30.0
TOTAL_SECONDS = 900.0


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
    total_seconds: float = TOTAL_SECONDS

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

        def download() -> None:
            with transfer_bar(file.name, enabled=self.progress) as bar, ExitStack() as responses:
                # After an error pooch leaves the connection open, for the garbage collector.
                def close_at_the_end(response, **_):
                    responses.callback(response.close)

                # Any object with the methods of a bar will do, but pooch's signature does not say.
                progressbar: Any = bar or False
                downloader = HTTPDownloader(
                    progressbar=progressbar,
                    chunk_size=1 << 16,
                    timeout=(self.connect_seconds, self.read_seconds),
                    hooks={"response": close_at_the_end},
                )
                downloader(url, buffer, None)

        try:
            within(self.total_seconds, download)
        except OSError as error:
            if getattr(error, "response", None) is not None:
                raise  # an answer, such as "404 Not Found": other files may be there
            # urllib3 wraps the reason in a message about its own retries.
            reason = getattr(error.args[0], "reason", error) if error.args else error
            raise Unavailable(f"no connection: {reason}") from error
        except DataError:
            raise
        except Exception as error:  # urllib3 has no common class for answers that make no sense
            raise OSError(f"an answer that is not HTTP: {error}") from error
        return unpack(buffer.getvalue(), limit=file.size, file=url)


def within(seconds: float, work: Callable[[], None]) -> None:
    """Do some work, or give up on it.

    A socket's timeout starts anew with each byte, so that one that drips is never late.

    Raises:
        TimeoutError: it takes longer; its thread is left behind.
        Exception: what the work raises.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not done within {seconds:g} s")
    if failures:
        raise failures[0]
