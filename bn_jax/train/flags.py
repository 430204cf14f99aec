"""Which values a setting may have, and how its flag is called and shown."""

import dataclasses
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tyro.conf import arg


class Must(NamedTuple):
    """What a field's values must be, in words and as a test; a default None always passes."""

    be: str
    holds: Callable[[Any], bool]


def integer_from(least: int, below: float = math.inf) -> Callable[[Any], bool]:
    """A test for integers, other than True and False, from least on and below a limit."""
    return lambda value: type(value) is int and least <= value < below


def number_from(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    """A test for finite numbers, other than True and False, from least to most."""
    return lambda value: type(value) in (int, float) and least <= value <= most and value < math.inf


def is_tuple(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether a value is a tuple whose items pass a test."""
    return isinstance(value, tuple) and all(map(holds, value))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, and another value as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


POSITIVE = Must("a positive integer", integer_from(1))
NOT_NEGATIVE = Must("an integer of at least 0", integer_from(0))
RATE = Must("finite and at least 0", number_from(0))
FOLDER = Must("a folder's path", lambda value: isinstance(value, Path))


def check_fields(settings: Any) -> None:
    """Check each field of a dataclass by the `Must` or the choices of its type.

    Raises:
        ValueError: a value is out of range, with the flag, the value and what it must be.
    """
    kinds = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, notes = getattr(settings, field.name), typing.get_args(kinds[field.name])
        if typing.get_origin(kinds[field.name]) is Literal:
            notes = [Must(f"one of {', '.join(notes)}", notes.__contains__)]
        for must in notes if value is not None or field.default is not None else ():
            if isinstance(must, Must) and not must.holds(value):
                raise out_of_range(field.name, value, must.be)


def out_of_range(name: str, value: object, rule: str) -> ValueError:
    """The error for a field's value, in the words of the command line."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) and value else repr(value)
    return ValueError(f"--{dashed(name)} {shown}: must be {rule}")


def dashed(name: str) -> str:
    """A field's name as its flag has it."""
    return name.replace("_", "-")


def unset(metavar: str, default: str) -> Any:
    """How help shows a flag whose default is None: what it takes, and what None stands for."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")
