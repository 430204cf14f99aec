"""`run_experiment` as one of several processes, which start, end and fail together."""

import os
import signal
import traceback
from pathlib import Path

import jax
from rich.console import Console

from bn_jax.train.config import TrainConfig
from bn_jax.train.crash_reporter import reporting_crashes
from bn_jax.train.experiment import Diverged, Interrupted, run_experiment
from bn_jax.train.launch import Launch, join
from bn_jax.train.processes import is_first
from bn_jax.train.sharding import choose_devices
from bn_jax.train.stopping import STATUS

FAILURES = ("UNKNOWN", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")


def run_with_others(
    config: TrainConfig, launch: Launch, console: Console, resume: Path | None = None
) -> None:
    """Meet the other processes and run the experiment; where that fails, end this process."""
    with launch.claimed(), reporting_crashes() as reporter:
        try:
            join(launch)
        except ValueError as error:
            reporter.leave(f"error: {error}\n", 2)
        reporter.note("met")
        try:
            choose_devices(config.device, config.devices, launch.processes or 1)
            run_experiment(
                config,
                console if is_first() else Console(quiet=True),
                lambda folder: reporter.note(f"folder {folder.path.absolute()}"),
                resume,
            )
            jax.distributed.shutdown()
        except Interrupted as stop:
            if stop.status == STATUS[signal.SIGTERM]:  # which stops all processes
                jax.distributed.shutdown()
            reporter.leave(f"{stop}\n" if is_first() else "", stop.status)
        except Diverged as end:
            jax.distributed.shutdown()  # waits until all processes have come here
            reporter.leave(f"error: {end}\n" if is_first() else "", 1)
        except KeyboardInterrupt:
            reporter.leave("stopped\n" if launch.process_id in (0, None) else "", 130)
        except Exception as error:
            if (reason := find_collective_failure(error)) is not None:
                reporter.note(f"lost {reason}")
                os._exit(1)
            # As in `main`: an error that the user can mend has no traceback.
            known = isinstance(error, ValueError | OSError)
            reporter.leave(f"error: {error}\n" if known else traceback.format_exc(), 1 + known)


def find_collective_failure(error: BaseException | None) -> str | None:
    """The first line of an error, or of its causes, that a collective raises if a process is gone.

    Such errors are of several classes; their text begins with one of XLA's status codes.
    """
    while error is not None:
        first, *_ = str(error).splitlines() or [""]
        if first.split(":")[0] in FAILURES:
            return first
        error = error.__cause__ or error.__context__
    return None
