"""When one of several processes goes: the others say so in one line, and go too.

Two things can tell. A collective fails, which is an exception like any other. Or JAX's service,
whose heartbeats miss a process, ends this one by `abort`, with pages about itself on the way; so
what C++ prints is kept aside, and the signal is answered here.
"""

import ctypes
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, NoReturn

import jax
from rich.console import Console

from bn_jax.train.config import TrainConfig
from bn_jax.train.experiment import Interrupted, last_checkpoint, run_experiment
from bn_jax.train.processes import is_first, loss_of_company
from bn_jax.train.run_folder import RunFolder

GONE = "another process of this run is gone, so this one ends too"
FATAL = b"distributed service detected fatal errors"


def run_in_company(config: TrainConfig, console: Console) -> None:
    """`run_experiment` as one of several processes that have met; ends this one if it fails."""

    def started(folder: RunFolder) -> None:
        company.explain = lambda: last_checkpoint(config, folder)

    with in_company(lambda: "it had no folder yet") as company:
        try:
            run_experiment(config, console if is_first() else Console(quiet=True), started)
            jax.distributed.shutdown()
        except Interrupted as stop:
            company.leave(f"{stop}\n" if is_first() else "", 130)
        except KeyboardInterrupt:
            company.leave("stopped\n" if is_first() else "", 130)
        except Exception as error:
            if reason := loss_of_company(error):
                company.lost(f" ({reason})")
            known = isinstance(error, ValueError | OSError)
            company.leave(f"error: {error}\n" if known else traceback.format_exc(), 1 + known)


class Company:
    """The processes of a run, as one of them sees the others' end.

    Attributes:
        explain: what to say then of what is left; set once something is.
    """

    def __init__(self, explain: Callable[[], str]) -> None:
        self.explain = explain
        self.once = threading.Lock()
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as we do)

    def leave(self, message: str, status: int) -> NoReturn:
        """End at once, without the farewells that wait for the others; only one thread does."""
        self.once.acquire()
        sys.stdout.flush()
        sys.stderr.write(message)
        sys.stderr.flush()
        os._exit(status)

    def lost(self, reason: str = "") -> NoReturn:
        """End because another process has."""
        self.leave(f"error: {GONE}{reason}; {self.explain()}\n", 1)

    def aborted(self, number: int) -> NoReturn:
        """Answer the signal SIGABRT: the service's, or else a failure that C++ has explained."""
        self.log.seek(0)
        text = self.log.read()
        if FATAL in text:
            self.lost()
        self.leave(text.decode(errors="replace"), 128 + number)


@contextmanager
def in_company(explain: Callable[[], str]) -> Iterator[Company]:
    """What is done inside ends, in one line, when another process does.

    Inside, what C++ prints goes to a file aside, and Python's streams where they went.

    Args:
        explain: what to say then of what is left.
    """
    company = Company(explain)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    streams = sys.stdout, sys.stderr
    kept = [os.dup(number) for number in (1, 2)]
    sys.stdout, sys.stderr = (
        os.fdopen(fd, "w", 1, encoding=stream.encoding, errors=stream.errors)
        for fd, stream in zip(kept, streams, strict=True)
    )
    for number in (1, 2):
        os.dup2(company.log.fileno(), number)
    # Python's own handlers run between its instructions: after an abort, there is no after.
    answer = ctypes.CFUNCTYPE(None, ctypes.c_int)(company.aborted)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, answer)
    try:
        yield company
    finally:
        libc.signal(signal.SIGABRT, None)
        for fd, number in zip(kept, (1, 2), strict=True):
            os.dup2(fd, number)
        sys.stdout, sys.stderr = streams
