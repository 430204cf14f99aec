"""A live transfer bar on standard error, in the shape that pooch asks of one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class TransferBar:
    """One bar: pooch sets ``total`` and calls ``update``, ``reset`` and ``close``.

    Until ``total`` is known, and forever if it never is, the bar pulses.
    """

    def __init__(self, description: str):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(description, total=None)
        self._progress.start()

    @property
    def total(self) -> float | None:
        """How many bytes will come; ``None`` where nobody knows."""
        return self._progress.tasks[0].total

    @total.setter
    def total(self, value: float) -> None:
        # A server that does not say how much it sends makes pooch say 0.
        self._progress.update(self._task, total=value or None)

    def update(self, amount: int) -> None:
        """Counts ``amount`` bytes more."""
        self._progress.update(self._task, advance=amount)

    def reset(self) -> None:
        """Counts from zero again; pooch does so at the end, to correct for a short last piece."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Takes the bar off the screen; a second time does nothing."""
        self._progress.stop()


@contextmanager
def transfer_bar(description: str, *, enabled: bool) -> Iterator[TransferBar | None]:
    """Shows a bar while the block runs, if someone is there to see it.

    Args:
        description: what is being transferred.
        enabled: ``False`` shows nothing.

    Yields:
        The bar, or ``None`` if not ``enabled`` or if standard error is not a terminal.
    """
    if not enabled or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    bar = TransferBar(description)
    try:
        yield bar
    finally:
        bar.close()
