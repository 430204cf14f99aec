"""See to it that Ctrl-C and SIGTERM end a command, whatever it is doing."""

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Make Ctrl-C stop the command even where Python ignores exceptions.

    In a callback of the garbage collector, of which JAX has some, Python prints a
    KeyboardInterrupt and goes on. Here it is sent again a moment later, until it arrives elsewhere.
    """
    report = sys.unraisablehook

    def resend(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, interrupt_main_thread).start()
        else:
            report(lost)

    sys.unraisablehook = resend
    try:
        yield
    finally:
        sys.unraisablehook = report


def interrupt_main_thread() -> None:
    """Do what Ctrl-C does; where the platform can, this also ends a system call."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextmanager
def answering_sigterm(say_so: Callable[[], None]) -> Iterator[None]:
    """Let a SIGTERM end the command with a word and the exit status that a shell expects."""

    def stop(*_: object) -> None:
        say_so()
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
