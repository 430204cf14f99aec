"""How a process finds the others of its run: by flags, environment variables or a scheduler."""

import contextlib
import dataclasses
import ipaddress
import re
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import jax

from bn_jax.files import locked
from bn_jax.train.flags import POSITIVE, check_fields, unset

HEARTBEAT = 30
"""Seconds of silence after which a process counts as gone, if its sockets do not tell at once."""

PATIENCE = 300
"""Seconds to wait for the others at the start: schedulers do not start all at once."""


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

    Raises:
        ValueError: a value is out of range.
    """

    coordinator: Annotated[
        str | None, unset("HOST:PORT", "$JAX_COORDINATOR_ADDRESS, else there is one process")
    ] = None
    processes: Annotated[int | None, POSITIVE, unset("INT", "$JAX_NUM_PROCESSES")] = None
    process_id: Annotated[int | None, unset("INT", "$JAX_PROCESS_ID")] = None
    distributed: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        host, _, port = (self.coordinator or "host:1").rpartition(":")
        if not host or not is_plain(port) or not 0 < int(port) < 2**16:
            raise ValueError(
                f"--coordinator {self.coordinator}: must be HOST:PORT, e.g. 127.0.0.1:7788"
            )
        number = self.process_id or 0
        if not 0 <= number < (self.processes or number + 1):
            most = f" to {self.processes - 1}" if self.processes else ""
            raise ValueError(f"--process-id {number}: must be from 0{most}, one for each process")

    def with_environment(self, environment: Mapping[str, str]) -> "Launch":
        """The flags, completed by the environment variables that JAX knows.

        Raises:
            ValueError: a variable is not a number, or out of range.
        """

        def number(name: str) -> int | None:
            text = environment.get(name)
            if text is not None and not is_plain(text):
                raise ValueError(f"{name}={text}: must be an integer of at least 0")
            return None if text is None else int(text)

        found = {
            "coordinator": environment.get("JAX_COORDINATOR_ADDRESS"),
            "processes": number("JAX_NUM_PROCESSES"),
            "process_id": number("JAX_PROCESS_ID"),
        }
        missing = {name: value for name, value in found.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    @property
    def is_alone(self) -> bool:
        """Whether nothing says that there are other processes."""
        return not self.distributed and self.given == (None, None, None)

    @property
    def given(self) -> tuple[str | None, int | None, int | None]:
        """Where to meet, how many processes, and which of them this is."""
        return self.coordinator, self.processes, self.process_id

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep a second process of this machine from taking the same id in the same run.

        JAX's service would take the second for the first, restarted, and end the run.

        Raises:
            ValueError: another process has this id.
        """
        with contextlib.ExitStack() as stack:
            if None not in self.given:  # else the scheduler gives the ids
                name = "-".join(re.findall(r"\w+", f"bn_jax {self.coordinator} {self.process_id}"))
                path = Path(tempfile.gettempdir(), f"{name}.lock")
                try:
                    stack.enter_context(locked(path, create=True))
                except BlockingIOError as error:
                    raise ValueError(
                        f"--process-id {self.process_id}: another process here has it in the run "
                        f"at {self.coordinator}; give each an id of its own"
                    ) from error
                except OSError:
                    pass  # a lock cannot be made there, so nothing is checked
            yield


def is_plain(text: str) -> bool:
    """Whether a text is a number in ASCII digits; int() takes those of other scripts too."""
    return text.isascii() and text.isdecimal()


ALONE = Launch()


def join(launch: Launch) -> None:
    """Meet the other processes of a run, before JAX is in use.

    If they do not come within `PATIENCE`, JAX ends this process.

    Raises:
        ValueError: something is missing that neither flag nor variable gives, or no scheduler.
    """
    flags = "--coordinator", "--processes", "--process-id"
    missing = [f for f, value in zip(flags, launch.given, strict=True) if value is None]
    if missing and not launch.distributed:
        raise ValueError(
            f"{' and '.join(missing)}: must be given too for a run of several processes; or let "
            "--distributed take it from the scheduler"
        )
    if launch.coordinator:
        check_address(launch.coordinator, here=launch.process_id == 0)
    # JAX waits in C++, where Python's handler of Ctrl-C does not run.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            *launch.given,
            coordinator_bind_address=bind_address(launch.coordinator),
            cluster_detection_method=None if launch.distributed else "deactivate",
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if missing:
            raise ValueError(
                f"--distributed: JAX finds no scheduler that gives {' and '.join(missing)} "
                f"({reason}); give what is missing by flags"
            ) from error
        raise ValueError(
            f"--coordinator {launch.coordinator}: the processes cannot meet there ({reason}); "
            "choose an address of process 0's machine and a port that is free"
        ) from error
    finally:
        signal.signal(signal.SIGINT, handler)


def check_address(address: str, here: bool) -> None:
    """Refuse an address for which JAX would wait in vain, or on which its service may crash.

    Args:
        address: host and port.
        here: whether this process starts the service.

    Raises:
        ValueError: the host is not known, or the port of this machine is taken.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), port)
    except OSError as error:
        raise ValueError(
            f"--coordinator {address}: the host is not known here ({error}); give a name or an "
            "address of process 0's machine"
        ) from error
    if not here:
        return
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise ValueError(
            f"--coordinator {address}: process 0 cannot listen there ({error}); choose a port "
            "that is free"
        ) from error


def bind_address(address: str | None) -> str | None:
    """The address that process 0 listens on: a loopback address as it is; None for all interfaces.

    Whoever reaches the port could end the run, or take part in it.
    """
    host = (address or "").rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return address if ipaddress.ip_address(host).is_loopback else None
    return address if host == "localhost" else None
