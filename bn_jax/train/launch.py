"""How a process finds the others of its run: by flags, environment variables or a scheduler."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax

from bn_jax.files import locked
from bn_jax.train.crash_reporter import REMEDY
from bn_jax.train.flags import NOT_NEGATIVE, POSITIVE, Must, check_fields, out_of_range, unset

HEARTBEAT = 30
"""Seconds of silence after which a process counts as gone, if its sockets do not tell at once."""

PATIENCE = 300
"""Seconds to wait for the others at the start: schedulers do not start all at once."""


def is_address(text: str) -> bool:
    """Whether a text is a host and a port."""
    port = re.fullmatch(r".+:([0-9]+)", text)
    return port is not None and 0 < int(port[1]) < 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """For a run of several processes, each started by the same command but for its id.

    Attributes:
        coordinator: Where the processes meet: an address of process 0's machine and a free port
            there.
        processes: How many processes.
        process_id: Which of them this is, from 0. Process 0 shows and writes the run.
        distributed: Take what is not given from the scheduler that started the processes, as far
            as JAX knows it: Slurm, Open MPI, Kubernetes, TPU pods.
    """

    coordinator: Annotated[
        str | None,
        Must("HOST:PORT, e.g. 127.0.0.1:7788", is_address),
        unset("HOST:PORT", "$JAX_COORDINATOR_ADDRESS, else there is one process"),
    ] = None
    processes: Annotated[int | None, POSITIVE, unset("INT", "$JAX_NUM_PROCESSES")] = None
    process_id: Annotated[int | None, NOT_NEGATIVE, unset("INT", "$JAX_PROCESS_ID")] = None
    distributed: bool = False

    def with_environment(self, environment: Mapping[str, str]) -> "Launch":
        """The flags, completed by the environment variables that JAX knows.

        Raises:
            ValueError: a value is out of range.
        """
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        found: dict[str, Any] = {}
        for field, name in zip(dataclasses.fields(self), names, strict=False):
            text = environment.get(name)
            if text is None or getattr(self, field.name) is not None:
                continue
            if field.name != "coordinator" and not re.fullmatch("[0-9]+", text):
                raise ValueError(f"{name}={text}: must be an integer of at least 0")
            found[field.name] = text if field.name == "coordinator" else int(text)
        launch = dataclasses.replace(self, **found)
        check_fields(launch)
        if launch.processes is not None and (launch.process_id or 0) >= launch.processes:
            rule = f"from 0 to {launch.processes - 1}, one for each process"
            raise out_of_range("process_id", launch.process_id, rule)
        return launch

    @property
    def is_alone(self) -> bool:
        """Whether nothing says that there are other processes."""
        return self == ALONE

    @property
    def given(self) -> tuple[str | None, int | None, int | None]:
        """Where to meet, how many processes, and which of them this is."""
        return self.coordinator, self.processes, self.process_id

    def claimed(self) -> contextlib.AbstractContextManager[None]:
        """Keep a second process of this machine from taking the same id in the same run.

        JAX's service would take the second for the first, restarted, and end the run.
        """
        if None in self.given:  # the scheduler gives the ids
            return contextlib.nullcontext()
        user = getattr(os, "getuid", int)()
        name = "-".join(re.findall(r"\w+", f"bn_jax {user} {self.coordinator} {self.process_id}"))
        taken = (
            f"--process-id {self.process_id}: another process here has it in the run at "
            f"{self.coordinator}; give each an id of its own"
        )
        return locked(Path(tempfile.gettempdir(), f"{name}.lock"), taken, create=True)


ALONE = Launch()


def join(launch: Launch) -> None:
    """Meet the other processes of a run, before JAX is in use; a ValueError says why not.

    If they do not come within `PATIENCE`, JAX ends this process.
    """
    local = launch.coordinator and check_address(launch.coordinator, launch.process_id == 0)
    # JAX waits in C++, where Python's handler of Ctrl-C does not run.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            *launch.given,
            coordinator_bind_address=launch.coordinator if local else None,
            cluster_detection_method=None if launch.distributed else "deactivate",
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the processes of this run cannot meet ({reason}); {REMEDY}; with a scheduler, "
            "--distributed takes what is missing from it"
        ) from error
    finally:
        signal.signal(signal.SIGINT, handler)


def check_address(address: str, here: bool) -> bool:
    """Refuse an address for which JAX would wait in vain, or `here`, where its service may crash.

    Returns whether it is this machine's loopback address, on which alone process 0 then listens:
    whoever reaches the port could end the run, or take part in it.
    """
    host, port = address.rpartition(":")[0].strip("[]"), int(address.rpartition(":")[2])
    try:
        socket.getaddrinfo(host, port)
        if here:
            socket.create_server(("", port)).close()
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"--coordinator {address}: the host is not known here ({error}); give a name or an "
            "address of process 0's machine"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--coordinator {address}: process 0 cannot listen there ({error}); choose a port "
            "that is free"
        ) from error
    return host in ("localhost", "::1") or host.startswith("127.")
