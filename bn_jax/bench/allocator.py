"""A memory allocator that does not give large arrays back between two turns."""

import os
import sys

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**30),
}
"""Arrays of tens of MB otherwise spend most of their time in page faults, whoever computes them."""


def keep_memory() -> None:
    """Start this process again, once, with an allocator (glibc's) that keeps its memory."""
    if sys.platform == "linux" and not ALLOCATOR.items() <= os.environ.items():
        os.environ.update(ALLOCATOR)
        os.execv(sys.executable, sys.orig_argv)
