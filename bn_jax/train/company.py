"""When one of several processes goes: the others say so in one line, and go too.

Two things can tell. A collective fails, which is an exception like any other; or JAX's service,
whose heartbeats miss a process, ends this one on the spot. In either case a `witness` has the last
word.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax
from rich.console import Console

from bn_jax.train import witness
from bn_jax.train.config import TrainConfig
from bn_jax.train.device import choose_device, split_cpu
from bn_jax.train.experiment import Diverged, Interrupted, run_experiment
from bn_jax.train.launch import Launch, join
from bn_jax.train.processes import is_first, loss_of_company
from bn_jax.train.stopping import STATUS


def run_in_company(
    config: TrainConfig, launch: Launch, console: Console, resume: Path | None = None
) -> None:
    """`run_experiment` as one of several processes, which meet first; ends this one if it fails."""
    with launch.claimed(), in_company() as company:
        try:
            join(launch)
        except ValueError as error:
            company.leave(f"error: {error}\n", 2)
        company.note("met")
        try:
            split_cpu(config.devices, launch.processes or 1)
            choose_device(config.device)
            run_experiment(
                config,
                console if is_first() else Console(quiet=True),
                lambda folder: company.note(f"folder {folder.path.absolute()}"),
                resume,
            )
            jax.distributed.shutdown()
        except Interrupted as stop:
            if stop.status == STATUS[signal.SIGTERM]:
                jax.distributed.shutdown()  # all have stopped
            company.leave(f"{stop}\n" if is_first() else "", stop.status)
        except Diverged as end:
            jax.distributed.shutdown()  # which waits until all have come here
            company.leave(f"error: {end}\n" if is_first() else "", 1)
        except KeyboardInterrupt:
            company.leave("stopped\n" if launch.process_id in (0, None) else "", 130)
        except Exception as error:
            if (reason := loss_of_company(error)) is not None:
                company.note(f"lost {reason}")
                os._exit(1)
            # What is known is said to the user without a traceback, as `main` does.
            known = isinstance(error, ValueError | OSError)
            company.leave(f"error: {error}\n" if known else traceback.format_exc(), 1 + known)


class Company:
    """The processes of a run, as one of them sees the others' end."""

    def __init__(self) -> None:
        self.witness = subprocess.Popen(
            [sys.executable, "-I", witness.__file__],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is not for it
        )
        assert self.witness.stdin is not None
        self.pipe = self.witness.stdin.fileno()

    def note(self, text: str) -> None:
        """Tell the witness; see there."""
        os.write(self.pipe, witness.MARK + text.replace("\n", " ").encode() + b"\n")

    def leave(self, message: str, status: int) -> NoReturn:
        """Say why and end, without the farewells that wait for the others."""
        self.note("done")
        sys.stdout.flush()
        sys.stderr.write(message)
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def in_company() -> Iterator[Company]:
    """What is done inside has a witness.

    What C++ prints there goes to the witness, and what Python prints where it always went.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    company = Company()
    streams = sys.stdout, sys.stderr
    kept = [os.dup(number) for number in (1, 2)]
    sys.stdout, sys.stderr = (
        os.fdopen(fd, "w", 1, encoding=stream.encoding, errors=stream.errors)
        for fd, stream in zip(kept, streams, strict=True)
    )
    for number in (1, 2):
        os.dup2(company.pipe, number)
    try:
        yield company
    finally:
        for fd, number in zip(kept, (1, 2), strict=True):
            os.dup2(fd, number)
        sys.stdout, sys.stderr = streams
        company.note("done")
        company.witness.communicate()
