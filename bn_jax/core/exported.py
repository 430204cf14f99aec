"""Named tuples that `jax.export` can write down, together with the function that takes them."""

import contextlib
from typing import TypeVar

from jax import export

Kind = TypeVar("Kind")


def exported(kind: type[Kind]) -> type[Kind]:
    """A class decorator: register a named tuple by its name for `jax.export`'s serialize.

    The name is part of what is written, so it must not change.
    """
    with contextlib.suppress(ValueError):  # registered already, as after importlib.reload
        export.register_namedtuple_serialization(kind, serialized_name=f"bn_jax.{kind.__name__}")
    return kind
