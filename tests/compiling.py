"""How the tests compile: as quickly as can be, and no program twice.

Nearly all of their time is compilation, of small programs whose speed does not matter. What is
about the optimizing compiler itself (errors of rounding, arrays that are kept, sums that are
fused) is marked ``optimized`` and compiles as for users.
"""

import contextlib
import functools
import os
import time
from pathlib import Path

import jax
from jax._src import compiler, lru_cache

get_compile_options = compiler.get_compile_options
quick = False


@functools.cache
def slow_options():
    """What makes up two thirds of a compilation for the CPU, where it can be done without.

    Newer compilers have nothing else to emit a fusion, and refuse the option.
    """
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return []
    return list(options.items())


@functools.wraps(get_compile_options)
def get_quick_options(*args, **kwargs):
    options = get_compile_options(*args, **kwargs)
    if quick:
        options.env_option_overrides = [*options.env_option_overrides, *slow_options()]
    return options


def compile_quickly(wanted: bool) -> None:
    """Whether what is compiled from now on compiles quickly.

    What is compiled for users is compiled anew, and not taken from a quick test.
    """
    global quick
    if quick and not wanted:
        jax.clear_caches()
    if wanted:
        slow_options()
    quick = wanted
    jax.config.update("jax_disable_most_optimizations", wanted)


def put_whole(self, key: str, value: bytes) -> None:
    """In place of JAX's ``put``: another process reads all of an entry, or does not find it."""
    path = Path(self.path) / f"{key}-cache"
    part = path.with_name(f"{key}.{os.getpid()}")
    part.write_bytes(value)
    part.replace(path)


def remember_programs(folder: Path) -> None:
    """Keeps compiled programs for other workers and a week of runs, unless the user says where."""
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if entry.stat().st_mtime < time.time() - 7 * 24 * 3600:
                entry.unlink()
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        lru_cache.LRUCache.put = put_whole


compiler.get_compile_options = get_quick_options
