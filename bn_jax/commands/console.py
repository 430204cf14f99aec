"""Where commands print."""

import logging
import sys

from rich.console import Console

# Without emoji: a path or target such as a:b: would have one in its middle.
stderr = Console(stderr=True, emoji=False)
stdout = Console(emoji=False)


def quiet_orbax() -> None:
    """Keep orbax from printing pages about errors that it also raises.

    It logs them. And where a disk is full, writes that end after the first failure find orbax's
    event loop closed; Python ignores that, and prints a traceback for each (seen with orbax 0.12.8
    and tensorstore). A test fills a disk and looks for tracebacks.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(ignored: "sys.UnraisableHookArgs") -> None:
        if str(ignored.exc_value) != "Event loop is closed":
            report(ignored)

    sys.unraisablehook = report_others
