"""What arguments may be: numpy's integers, Python lists, and values that can be looked at."""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.core
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def check_kind(name: str, value: object, kind: type) -> None:
    """Refuse a named tuple in the place of another, or the dict of a checkpoint."""
    if not isinstance(value, kind):
        fields = ", ".join(kind._fields)
        raise TypeError(
            f"{name} is a {type(value).__name__}, but must be a {kind.__name__} with the fields "
            f"{fields}; check the order of the arguments, or make one of a dict: "
            f"{kind.__name__}(**{name})"
        )


def as_integers(name: str, value: SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
    """One integer or several as a tuple of Python's.

    Raises:
        TypeError: a value is no integer.
    """
    try:
        return (operator.index(value),)  # pyright: ignore[reportArgumentType]
    except TypeError:
        pass
    try:
        return tuple(operator.index(each) for each in value)  # pyright: ignore
    except TypeError:
        raise TypeError(
            f"{name}={value!r} must be an integer or several, e.g. {name}=1 or {name}=(1, 2)"
        ) from None


def as_array(value: ArrayLike | Sequence[Any]) -> Array:
    """An array of JAX; what JAX traces stays as it is, for inference op by op.

    jnp.asarray converts a tracer to its own dtype, and jax.debug_nans would find padding there.
    """
    return value if isinstance(value, jax.core.Tracer) else jnp.asarray(value)


def as_floats(*values: Any) -> Any:
    """Lists and arrays of numbers as inexact arrays of JAX; None stays None."""

    def read(value: Any) -> Array | None:
        if value is None:
            return None
        array = jnp.asarray(value)
        exact = not jnp.issubdtype(array.dtype, jnp.inexact)
        return array.astype(jnp.result_type(float)) if exact else array

    return [read(value) for value in values]


def is_concrete(value: object) -> bool:
    """Whether the numbers can be looked at: neither traced nor on another process's devices."""
    return not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)
