"""Values of flags that cannot work, each answered in one line, before any package is loaded."""

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from bn_jax import hints


def check_values(command: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Raise a ValueError with a hint at the first value that its flag does not take."""
    given = hints.given_flags(arguments)
    if "--help" in given or "-h" in given:
        return
    for name, kind in hints.fields_of(command).items():
        if (flag := hints.flag_of(name)) in given:
            check_choice(flag, given[flag], kind)
    if "--hidden" in given:
        check_sizes(given["--hidden"])
    if "--renorm" in given:
        check_limits(given["--renorm"])


def check_choice(flag: str, text: str, kind: Any) -> None:
    """Raise a ValueError with a hint unless the first word is one of the choices, if it has any."""
    choices = [
        choice
        for one in (kind, *typing.get_args(kind))
        if typing.get_origin(one) is Literal
        for choice in typing.get_args(one)
    ]
    word = text.partition(" ")[0]  # what follows is no value of this flag
    if choices and word and word not in choices:
        near = hints.nearest(word, choices)
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"{flag} {word}: must be one of {', '.join(choices)}{hint}")


def check_sizes(text: str) -> None:
    """Raise a ValueError with a hint unless --hidden has integers with spaces between them."""
    sizes = text.replace(",", " ").split()
    if text.split() != sizes or not all(size.lstrip("+-").isdigit() for size in sizes or ["-"]):
        example = " ".join(size for size in sizes if size.isdigit()) or "100 100 100"
        shown = f"--hidden {text}".strip()
        raise ValueError(f"{shown}: must be integers, as in --hidden {example}")


def check_limits(text: str) -> None:
    """Raise a ValueError unless --renorm has two numbers with a space between them."""
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) != 2:
        shown = f"--renorm {text}".strip()
        raise ValueError(f"{shown}: must be two numbers, R_MAX D_MAX, as in --renorm 3 5")


def check_axes(over: Sequence[str], names: Mapping[str, str]) -> None:
    """Raise a ValueError with a hint unless each of --over is NAME=NUMBER,….

    Args:
        over: what is given.
        names: the fields that can be swept, each with its flag.
    """
    known = [flag.removeprefix("--") for flag in names.values()]
    for axis in over:
        name, equals, values = axis.partition("=")
        if not equals:
            raise ValueError(f"--over {axis}: must be NAME=NUMBER,…, as in learning-rate=0.1,0.3")
        if name.replace("_", "-") not in known:
            meant = hints.other_name(name, list(names.values())) or hints.nearest(name, known)
            meant = meant and meant.removeprefix("--")
            hint = f"did you mean {meant}?" if meant else f"choose one of {', '.join(known)}"
            raise ValueError(f"--over {axis}: there is no {name} to sweep; {hint}")
        for value in values.split(","):
            try:
                hints.read_number(value)
            except ValueError as error:
                raise ValueError(f"--over {axis}: {error}") from None
