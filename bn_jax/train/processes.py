"""One run in several processes: process 0 speaks, all know what it knows, and all end together."""

import zlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

LOSSES = ("UNKNOWN", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")


def is_first() -> bool:
    """Whether this process shows and writes the run."""
    return jax.process_index() == 0


def by_first(make: Callable[[], bytes]) -> bytes:
    """What make returns in process 0, where alone it is called; its error is everyone's.

    Raises:
        ValueError: in process 0, what make raises; in the others, its message.
    """
    if jax.process_count() == 1:
        return make()
    failure: ValueError | None = None
    answer = b""
    if is_first():
        try:
            answer = b"+" + make()
        except ValueError as error:
            failure, answer = error, b"-" + str(error).encode()
    answer = broadcast(answer)
    if failure is not None:
        raise failure
    if answer[:1] == b"-":
        raise ValueError(f"process 0 says: {answer[1:].decode()}")
    return answer[1:]


def check_same(settings: Mapping[str, object]) -> None:
    """Refuse processes that were started with different settings: their run would be none of them.

    Raises:
        ValueError: in every process, with the names of what differs.
    """
    marks = [zlib.crc32(repr(value).encode()) for value in settings.values()]
    everyone = multihost_utils.process_allgather(np.array(marks, np.uint32))
    differ = [
        "--" + name.replace("_", "-")
        for name, column in zip(settings, np.asarray(everyone).T, strict=True)
        if len(set(column.tolist())) > 1
    ]
    if differ:
        raise ValueError(
            f"{' and '.join(differ)}: not the same in all processes; start each with the same "
            "flags but for --process-id"
        )


def broadcast(content: bytes) -> bytes:
    """The content that process 0 has."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def loss_of_company(error: BaseException | None) -> str | None:
    """What an error says if it, or what caused it, is a collective's that lacks a member.

    Such errors are of several classes; they begin with one of XLA's codes.
    """
    while error is not None:
        first, *_ = str(error).splitlines() or [""]
        if first.split(":")[0] in LOSSES:
            return first
        error = error.__cause__ or error.__context__
    return None
