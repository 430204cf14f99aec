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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NamedTuple, NoReturn, TextIO

REMEDY = (
    "start each with its own --process-id, and all with the same --processes and --coordinator, an "
    "address of process 0's machine and a port that is free there"
)
UNMET = f"the processes of this run did not meet in time; {REMEDY}"
GONE = "another process of this run is gone, so this one ends too"
FATAL = b"distributed service detected fatal errors"
MARK = b"\0bn-jax "
"""Begins a note to the reporter: met, folder PATH, lost REASON or done. Other text is C++'s."""
LONGEST = 2**16
"""Bytes of C++'s text that are kept, the last ones."""


class CrashReporter(NamedTuple):
    """The reporter of this process, by the pipe that it reads."""

    pipe: int

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
    command = [sys.executable, "-I", __file__]
    with (  # in a session of its own, Ctrl-C does not reach it
        subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as program,
        ExitStack() as stack,
    ):
        assert program.stdin is not None
        reporter = CrashReporter(program.stdin.fileno())
        stack.callback(reporter.note, "done")
        for number, name in (1, "stdout"), (2, "stderr"):
            stream = getattr(sys, name)
            stream.flush()
            kept = os.dup(number)
            encoding = {"encoding": stream.encoding, "errors": stream.errors}
            own = stack.enter_context(os.fdopen(kept, "w", 1, **encoding))
            stack.callback(setattr, sys, name, stream)
            stack.callback(os.dup2, kept, number)
            setattr(sys, name, own)
            os.dup2(reporter.pipe, number)
        yield reporter


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
