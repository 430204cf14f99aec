"""What arguments may be. Whatever is refused: the argument, its value, and the remedy."""

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
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
    """One integer or several, as a tuple of Python's.

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
    """A JAX array; a traced one stays as it is, so that inference works op by op.

    jnp.asarray converts a tracer to its own dtype, and jax.debug_nans would find padding there.

    Raises:
        TypeError: it is what `batch_norm` or `standardize` returned, not yet taken apart.
    """
    if isinstance(value, tuple) and any(hasattr(part, "_fields") for part in (value, *value)):
        raise TypeError(
            "x is a tuple, but must be an array; batch_norm returns (y, state): take y alone, "
            "y, state = batch_norm(...)"
        )
    return value if isinstance(value, jax.core.Tracer) else jnp.asarray(value)


def as_floats(*values: Any) -> Any:
    """Lists and arrays of numbers as inexact JAX arrays; None stays None."""

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


def check_train(train: object) -> None:
    """Refuse a traced flag: which branch runs decides what is computed."""
    if isinstance(train, jax.core.Tracer):
        raise TypeError(
            "train is traced, but must be a Python bool: mark it static, "
            "jax.jit(f, static_argnames='train'), or bind it, functools.partial(f, train=True)"
        )
    if not isinstance(train, bool | np.bool_):
        raise TypeError(f"train={train!r} must be True or False")


def check_epsilon(epsilon: ArrayLike) -> None:
    """Refuse an epsilon that is no number, negative or not finite; a traced one is taken as is."""
    if np.shape(epsilon):
        raise ValueError(f"epsilon has shape {np.shape(epsilon)}, but is one number, e.g. 1e-5")
    if not isinstance(epsilon, jax.core.Tracer) and not 0 <= np.asarray(epsilon) < np.inf:
        raise ValueError(f"epsilon={epsilon} must be finite and not negative, e.g. 1e-5")


def check_weights(where: Array | np.ndarray) -> None:
    """Refuse what can be neither a mask nor weights."""
    if where.dtype != bool and not any(
        jnp.issubdtype(where.dtype, kind) for kind in (jnp.integer, jnp.floating)
    ):
        raise TypeError(
            f"where has dtype {where.dtype}; give a bool mask (True counts), integers (how often "
            "each value counts) or float weights, e.g. where.astype(bool)"
        )
    if where.dtype != bool and is_concrete(where):
        weights = np.asarray(where)
        if not (weights >= 0).all():
            raise ValueError(
                f"where holds the weight {weights[~(weights >= 0)][0]}; weights are counts or "
                "importances and cannot be negative or NaN"
            )


def check_features(
    shape: tuple[Any, ...], x: Array, axes: tuple[int, ...], **values: Array | None
) -> None:
    """Refuse numbers per feature that do not fit x in shape or complexity, by their names."""
    for name, value in values.items():
        if value is not None and mixes_complex(name, value, x):
            raise TypeError(
                f"{name} has dtype {value.dtype} and x {x.dtype}; the mean of complex data is "
                f"complex and their var real, as init({shape}, dtype=jnp.{x.dtype}) makes them; "
                "for real data all are real"
            )
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but x of shape {x.shape} has features of "
                f"shape {shape} on axes {axes}; set feature_axis, or init({shape})"
            )


def mixes_complex(name: str, value: Array, x: Array) -> bool:
    """Whether a value would lose its imaginary part, or x its own to a real mean."""
    if name == "mean":
        return jnp.iscomplexobj(value) != jnp.iscomplexobj(x)
    return jnp.iscomplexobj(value) and (name == "var" or not jnp.iscomplexobj(x))


def check_alike(a: ArrayLike, b: ArrayLike) -> None:
    """Refuse to merge moments of other features; a and b are their means."""
    if np.shape(a) != np.shape(b):
        raise ValueError(
            f"a has features of shape {np.shape(a)} and b of shape {np.shape(b)}; merge takes "
            "moments of the same features, e.g. of two batches"
        )


def check_average(average: object) -> None:
    """Refuse a number where a function of the count belongs."""
    if not callable(average):
        raise TypeError(
            f"average={average!r} must be a function, count -> weight of the past, e.g. "
            "DebiasedEma(0.99), Ema(0.99) or CumulativeAverage()"
        )


def check_weight(kept: ArrayLike, average: object) -> None:
    """Refuse the result of an average that is no weight, if its value is known."""
    if is_concrete(kept) and ((np.asarray(kept) < 0) | (np.asarray(kept) > 1)).any():
        raise ValueError(
            f"average={average!r} returned {kept}, which is outside of [0, 1]; it must return the "
            "weight of the past, e.g. 0.99"
        )


def check_decay(decay: Any) -> None:
    """Refuse a decay that is no weight."""
    if not 0 <= decay <= 1:
        raise ValueError(
            f"decay={decay} is outside of [0, 1]; it is the weight of the past (0.99 keeps 99%), "
            "where torch's momentum is the weight of the new batch: decay = 1 - momentum"
        )
