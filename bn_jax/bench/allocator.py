"""A memory allocator that keeps large arrays between turns."""

import os
import sys

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**30),
}
"""Without these settings, page faults take most of the time for arrays of tens of MB."""


def keep_memory() -> None:
    """Restart this process, once, with glibc's allocator set to keep freed memory."""
    if sys.platform == "linux" and not ALLOCATOR.items() <= os.environ.items():
        os.environ.update(ALLOCATOR)
        os.execv(sys.executable, sys.orig_argv)
