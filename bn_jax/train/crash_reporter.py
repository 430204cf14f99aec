"""One line on why a process of a run died, where JAX ended it from within C++.

When a process dies, JAX's service aborts the others, after pages of log. So each process of a run
has a crash reporter: this file as a program, which reads what C++ prints and, when the process is
gone, says what happened. It needs Python alone, and starts in no time.

`jax_enable_recoverability` does not replace it (tried with jax 0.10.2): where process 0 dies, the
others are aborted all the same, and where another dies, those outside of a collective go on.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NoReturn, TextIO

UNMET = (
    "the processes of this run did not meet in time; start each with its own --process-id, and all "
    "with the same --coordinator, an address of process 0's machine, and --processes"
)
GONE = "another process of this run is gone, so this one ends too"
FATAL = b"distributed service detected fatal errors"
MARK = b"\0bn-jax "
"""Begins a note to the reporter: met, folder PATH, lost REASON or done. Other text is C++'s."""
LONGEST = 2**16
"""Bytes of C++'s text that are kept, the last ones."""


class CrashReporter:
    """The reporter of this process, which writes to its pipe."""

    def __init__(self) -> None:
        self.program = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C does not reach it
        )
        assert self.program.stdin is not None
        self.pipe = self.program.stdin.fileno()

    def note(self, text: str) -> None:
        """Write a note; see `MARK`."""
        os.write(self.pipe, MARK + text.replace("\n", " ").encode() + b"\n")

    def leave(self, message: str, status: int) -> NoReturn:
        """End this process with a message, at once: JAX's own teardown waits for the others."""
        self.note("done")
        sys.stdout.flush()
        sys.stderr.write(message)
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def reporting_crashes() -> Iterator[CrashReporter]:
    """Inside, what C++ prints goes to a crash reporter, and what Python prints where it went."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reporter = CrashReporter()
    streams = sys.stdout, sys.stderr
    kept = [os.dup(number) for number in (1, 2)]
    sys.stdout, sys.stderr = (
        os.fdopen(fd, "w", 1, encoding=stream.encoding, errors=stream.errors)
        for fd, stream in zip(kept, streams, strict=True)
    )
    for number in (1, 2):
        os.dup2(reporter.pipe, number)
    try:
        yield reporter
    finally:
        for fd, number in zip(kept, (1, 2), strict=True):
            os.dup2(fd, number)
        sys.stdout, sys.stderr = streams
        reporter.note("done")
        reporter.program.communicate()


def report(source: BinaryIO, target: TextIO) -> None:
    """Read until the process is gone; then say why, unless it noted that it was done."""
    notes: dict[bytes, str] = {}
    text = b""
    for line in source:
        before, mark, note = line.rpartition(MARK)
        if mark:
            kind, _, value = note.rstrip(b"\n").partition(b" ")
            notes[kind] = value.decode(errors="replace")
            line = before
        text = (text + line)[-LONGEST:]
    if b"done" in notes:
        return
    failure = re.search(rb"^F\d{4} .*", text, re.DOTALL | re.MULTILINE)
    fatal = failure is not None and FATAL in failure[0]
    if fatal and b"met" not in notes:
        target.write(f"error: {UNMET}\n")
    elif fatal or b"lost" in notes:
        reason = f" ({notes[b'lost']})" if notes.get(b"lost") else ""
        folder = Path(notes[b"folder"]) if b"folder" in notes else None
        target.write(f"error: {GONE}{reason}; {describe_checkpoints(folder)}\n")
    elif failure:
        target.write(failure[0].decode(errors="replace"))
    target.flush()


def describe_checkpoints(folder: Path | None) -> str:
    """Which checkpoint a run that ended early can go on from, and how, in words."""
    found = folder.glob("checkpoints/*/*") if folder else ()
    # orbax gives a plain number as a name to a finished checkpoint.
    finished = [path for path in found if path.name.isdecimal()]
    if not finished:
        return "no checkpoint was due yet"
    # Arms are trained in the order of their names. A folder's time does not tell which checkpoint
    # is the newest: deleting a file in it changes its time.
    newest = max(finished, key=lambda path: (path.parent.name, int(path.name)))
    return f"the last checkpoint is {newest}; to go on: bn-jax train --resume {quote(str(folder))}"


if __name__ == "__main__":
    report(sys.stdin.buffer, sys.stderr)
