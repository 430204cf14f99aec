"""How a run is asked to end early: by Ctrl-C, or by SIGTERM, which schedulers send.

While it trains, the run ends after the current compiled call, where it can save a checkpoint.
Otherwise, and at a second Ctrl-C or SIGTERM, it ends at once.
"""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""The exit status that a shell gives to a process that a signal ended."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the exit status to stop with, or 0 to go on.

    Every process of a run calls it after each compiled call; JAX tells all of them of a SIGTERM to
    one, at the same call. A Ctrl-C ends one of several processes at once, and with it the others.
    """
    if jax.process_count() > 1:
        agreed, calls = multihost_utils.reached_preemption_sync_point, itertools.count(1)
        yield lambda: STATUS[signal.SIGTERM] if agreed(next(calls)) else 0
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may handle signals
        return
    status = 0

    def note(number: int, _: object) -> None:
        nonlocal status
        if status:
            raise KeyboardInterrupt
        status = STATUS[signal.Signals(number)]

    before = {number: signal.signal(number, note) for number in STATUS}
    try:
        yield lambda: status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
