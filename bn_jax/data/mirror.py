"""A public web server that has the files, over HTTPS."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from bn_jax.data.catalog import DataFile
from bn_jax.data.errors import DataError
from bn_jax.data.integrity import unpack
from bn_jax.data.sources import Unavailable, transfer_bar


@dataclass(frozen=True)
class Mirror:
    """A web server that has each file as ``url`` + name + ``.gz``.

    ``read_seconds`` is the longest silence within an answer, ``total_seconds`` the longest answer.
    """

    url: str
    progress: bool = False
    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    total_seconds: float = 900.0

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        return f"the mirror {self.url}"

    def read(self, file: DataFile) -> bytes:
        """Downloads one file into memory and decompresses it.

        Raises:
            DataError: the server sent something else.
            Unavailable: the server cannot be reached, or requests is not installed.
            OSError: the server answered, but not with the file.
        """
        try:
            with transfer_bar(file.name, enabled=self.progress) as update:
                data = within(self.total_seconds, lambda: self._download(file, update))
        except ImportError as error:
            raise Unavailable("requests is not installed: pip install requests") from error
        except DataError:
            raise
        except OSError as error:
            if getattr(error, "response", None) is not None:
                raise  # an answer, such as "404 Not Found": other files may be there
            # urllib3 wraps the reason in a message about its own retries.
            reason = getattr(error.args[0], "reason", error) if error.args else error
            raise Unavailable(f"no connection: {reason}") from error
        except Exception as error:  # urllib3 has no common class for answers that make no sense
            raise OSError(f"an answer that is not HTTP: {error}") from error
        return unpack(data, limit=file.size, file=f"{self.url}{file.name}.gz")

    def _download(self, file: DataFile, update: Callable[..., None]) -> bytes:
        """Returns what the server sends, unless that is too long."""
        import requests

        url, data = f"{self.url}{file.name}.gz", bytearray()
        timeout = (self.connect_seconds, self.read_seconds)
        with requests.get(url, timeout=timeout, stream=True) as response:
            response.raise_for_status()
            update(total=int(response.headers.get("Content-Length", 0)) or None)
            for piece in response.iter_content(1 << 16):
                data += piece
                update(advance=len(piece))
                if len(data) > file.gzip_limit:
                    raise DataError(
                        f"{url}: found a download of more than {file.gzip_limit:,} bytes, expected "
                        "no more than that; the server sends another file: use another source"
                    )
        return bytes(data)


def within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """Returns the result of some work, or gives up and lets its thread run on.

    A socket's timeout starts anew with each byte, so it does not stop a server that sends slowly
    for ever.

    Raises:
        TimeoutError: the work takes longer.
        Exception: what the work raises.
    """
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise  # the work's own
        raise TimeoutError(f"not done within {seconds:g} s") from None
