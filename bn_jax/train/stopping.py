"""How a run is asked to end early: by Ctrl-C, or by SIGTERM as schedulers send it.

While it trains, it ends between two compiled calls, where it can go on later. Elsewhere, and at the
second time of asking, it ends on the spot.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""A shell's exit status for a process that a signal ended."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the exit status to stop with, or 0 to go on.

    Every process of a run calls it after each compiled call, and all hear of a SIGTERM at the same
    one: JAX tells them. A Ctrl-C ends one of several processes on the spot, and with it the others.
    """
    if jax.process_count() > 1:
        calls = 0

        def agreed() -> int:
            nonlocal calls
            calls += 1
            stop = multihost_utils.reached_preemption_sync_point(calls)
            return STATUS[signal.SIGTERM] if stop else 0

        yield agreed
        return

    status = 0

    def note(number: int, _: object) -> None:
        nonlocal status
        if status:
            raise KeyboardInterrupt
        status = STATUS[signal.Signals(number)]

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # Python tells the main thread alone
        return
    before = {number: signal.signal(number, note) for number in STATUS}
    try:
        yield lambda: status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
