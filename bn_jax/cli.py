"""The command line, `bn-jax COMMAND`, also as `python -m bn_jax COMMAND`.

A command is a function in `commands`; its arguments, types and docstring are its flags and its
help. It imports slow packages itself, while a line says so, so that help and mistakes are answered
at once.
"""

import contextlib
import importlib.metadata
import inspect
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

try:
    import tyro
    from rich.markup import escape
except ModuleNotFoundError as error:
    if sys.argv[1:] == ["--version"]:
        raise SystemExit(f"bn-jax {importlib.metadata.version('bn-jax')}") from error
    raise SystemExit(
        f"bn-jax needs {error.name}; install it from the checkout with: pip install -e '.[train]'"
    ) from error

from bn_jax import __version__, hints
from bn_jax.commands.console import stderr
from bn_jax.commands.measuring import bench, conform, reproduce
from bn_jax.commands.scoring import evaluate, explain
from bn_jax.commands.training import sweep, train
from bn_jax.flag_values import check_values
from bn_jax.interrupts import answering_sigterm, no_interrupt_lost

COMMANDS = {
    "train": train,
    "sweep": sweep,
    "evaluate": evaluate,
    "explain": explain,
    "conform": conform,
    "reproduce": reproduce,
    "bench": bench,
}


def show_help() -> None:
    """Print the commands, each with the first line of its docstring."""
    lines = [
        f"  {name:10}{(inspect.getdoc(f) or '').partition(chr(10))[0]}"
        for name, f in COMMANDS.items()
    ]
    print("usage: bn-jax COMMAND [FLAGS]\n\nBatch normalization for JAX.\n")
    print(*lines, sep="\n")
    print("\nbn-jax COMMAND --help shows the flags of a command, bn-jax --version the versions.")


def run_command(arguments: Sequence[str]) -> None:
    """Run the command that a command line names, or show help or the versions.

    Raises:
        ValueError: it cannot be run; with a hint at what was probably meant.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        show_help()
    elif name in ("-V", "--version", "version"):
        versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "optax")]
        print(f"bn-jax {__version__} ({', '.join(versions)}, Python {platform.python_version()})")
    else:
        hints.check_command(name, tuple(COMMANDS))
        command = COMMANDS[name]
        hints.check_flags(name, hints.describe_flags(command), rest)
        check_values(command, rest)
        markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
        tyro.cli(command, prog=f"bn-jax {name}", args=rest, config=markers, registry=numbers)


numbers = tyro.constructors.ConstructorRegistry()


@numbers.primitive_rule
def read_as_number(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Read numbers, given or None, with errors that a user understands."""
    readers = {int: ("INT", hints.read_integer), float: ("FLOAT", hints.read_number)}
    if kind.type == float | tuple[float, ...]:
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="FLOAT [FLOAT ...]",
            instance_from_str=read_one_or_several,
            is_instance=lambda value: isinstance(value, int | float | tuple),
            str_from_instance=lambda value: [str(value)],
        )
    for number, (metavar, read) in readers.items():
        if kind.type in (number, number | None):
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar=metavar,
                instance_from_str=lambda words, read=read: read(words[0]),
                is_instance=lambda value: isinstance(value, int | float | None),
                str_from_instance=lambda value: [str(value)],
            )
    return None


def read_one_or_several(words: list[str]) -> float | tuple[float, ...]:
    """One number, or a tuple of several."""
    first, *others = map(hints.read_number, words)
    return (first, *others) if others else first


def say_stopped() -> None:
    """Answer a signal that ends the command."""
    stderr.print("[yellow]stopped[/yellow]")


def main() -> None:
    """Run a command; an error that the user can mend is one line and status 2, no traceback."""
    try:
        with no_interrupt_lost(), answering_sigterm(say_stopped):
            try:
                run_command(sys.argv[1:])
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # as in `bn-jax train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        stderr.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say_stopped()
        sys.exit(130)


def program() -> None:
    """`main` as a process of its own.

    After a signal the process ends without Python's teardown, during which XLA's threads, still
    compiling, would crash it (exit status -11 instead of 130).
    """
    status: Any = 130  # also where a second Ctrl-C comes while the first is answered
    try:
        with contextlib.suppress(KeyboardInterrupt):
            main()
            return
    except SystemExit as stop:
        if stop.code not in (130, 143):
            raise
        status = stop.code
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    program()
