"""The last words of a process that cannot speak any more.

JAX's service ends a process at once when another one is gone, from within C++, with pages about
itself. A witness is a small process beside each one of a run: it reads what C++ prints there, and
says in one line what has happened. As a program it needs Python alone, and starts in no time.
"""

import re
import sys
from pathlib import Path
from shlex import quote
from typing import BinaryIO, TextIO

UNMET = (
    "the processes of this run did not meet in time; start each with its own --process-id, and all "
    "with the same --coordinator, an address of process 0's machine, and --processes"
)
GONE = "another process of this run is gone, so this one ends too"
FATAL = b"distributed service detected fatal errors"
MARK = b"\0bn-jax "
"""Begins a line that is not C++'s, but for the witness: met, folder PATH, lost REASON or done."""
ENOUGH = 2**16
"""Bytes of C++'s text that are kept."""


def watch(source: BinaryIO, target: TextIO) -> None:
    """Read until the process is no more; then say why, if it has not."""
    notes: dict[bytes, str] = {}
    text = b""
    for line in source:
        before, mark, note = line.rpartition(MARK)
        if mark:
            kind, _, value = note.rstrip(b"\n").partition(b" ")
            notes[kind] = value.decode(errors="replace")
            line = before
        text = (text + line)[-ENOUGH:]
    if b"done" in notes:
        return
    failure = re.search(rb"^F\d{4} .*", text, re.DOTALL | re.MULTILINE)
    fatal = failure is not None and FATAL in failure[0]
    if fatal and b"met" not in notes:
        target.write(f"error: {UNMET}\n")
    elif fatal or b"lost" in notes:
        reason = f" ({notes[b'lost']})" if notes.get(b"lost") else ""
        folder = Path(notes[b"folder"]) if b"folder" in notes else None
        target.write(f"error: {GONE}{reason}; {remains(folder)}\n")
    elif failure:
        target.write(failure[0].decode(errors="replace"))
    target.flush()


def remains(folder: Path | None) -> str:
    """What a run that ends early leaves, in words."""
    found = folder.glob("checkpoints/*/*") if folder else ()
    # orbax gives a plain number as a name to what is whole.
    whole = [path for path in found if path.name.isdecimal()]
    if not whole:
        return "no checkpoint was due yet"
    # Arms are trained in the order of their names. Times tell nothing: deletion renews them.
    newest = max(whole, key=lambda path: (path.parent.name, int(path.name)))
    return f"the last checkpoint is {newest}; to go on: bn-jax train --resume {quote(str(folder))}"


if __name__ == "__main__":
    watch(sys.stdin.buffer, sys.stderr)
