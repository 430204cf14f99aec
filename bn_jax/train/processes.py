"""What the processes of one run do together: process 0 decides and the others hear of it."""

import zlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process shows and writes the run."""
    return jax.process_index() == 0


def by_first(make: Callable[[], bytes]) -> bytes:
    """Call make in process 0 alone; all processes return its result, or raise its error.

    Only bytes go over the network, as nothing that comes from there is unpickled.
    """
    if jax.process_count() == 1:
        return make()
    failure, answer = None, b""
    if is_first():
        try:
            answer = b"+" + make()
        except (ValueError, OSError) as error:
            failure, answer = error, b"-" + str(error).encode()
    answer = broadcast(answer)
    if failure is not None:
        raise failure
    if answer[:1] == b"-":
        raise ValueError(f"process 0 says: {answer[1:].decode()}")
    return answer[1:]


def check_same(settings: Mapping[str, object]) -> None:
    """Refuse, in every process, to go on unless all were started with the same settings."""
    hashes = [zlib.crc32(repr(value).encode()) for value in settings.values()]
    everyone = multihost_utils.process_allgather(np.array(hashes, np.uint32))
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
    """Returns the content of process 0 in all processes."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
