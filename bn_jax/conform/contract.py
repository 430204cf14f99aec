"""What a batch norm on trial may offer, and how its functions are called.

A batch norm on trial is a function `batch_norm`; five more may stand beside it, in its module or as
attributes of the same object. All take and return numpy arrays, features last. `mask`, `masks` and
`groups` are passed by name, and only to functions that have a parameter of that name.

    batch_norm(x, scale, bias, epsilon, mask=None) -> y, mean, var
    gradient(x, scale, bias, epsilon, dy, mask=None) -> dx, dscale, dbias
    infer(x, scale, bias, epsilon, mean, var) -> y
    running(batches, decay, masks=None) -> mean, var
    sharded(x, scale, bias, epsilon, mask=None, groups=None) -> y, mean, var
    renorm(x, scale, bias, epsilon, mean, var, r_max, d_max) -> y

.docs/conform.md explains them. What is absent, or raises NotImplementedError, is not offered.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bn_jax.conform.vectors import Vector, dtype_of

FUNCTIONS = {
    "batch_norm": (("x", "scale", "bias", "epsilon"), ("y", "mean", "var")),
    "gradient": (("x", "scale", "bias", "epsilon", "dy"), ("dx", "dscale", "dbias")),
    "infer": (("x", "scale", "bias", "epsilon", "mean", "var"), ("y",)),
    "running": (("batches", "decay"), ("mean", "var")),
    "sharded": (("x", "scale", "bias", "epsilon"), ("y", "mean", "var")),
    "renorm": (("x", "scale", "bias", "epsilon", "mean", "var", "r_max", "d_max"), ("y",)),
}
"""Each function's positional arguments and its results."""

NAMED = ("mask", "masks", "groups")


class Candidate(NamedTuple):
    """A batch norm on trial.

    Attributes:
        name: what it is called in reports.
        functions: those of FUNCTIONS that it offers.
        unbiased: whether it says that its running variance is unbiased; None if it says nothing.

    >>> from bn_jax.conform.find import find
    >>> sorted(find("bn_jax.conform.example").functions)
    ['batch_norm', 'gradient', 'infer', 'renorm', 'running', 'sharded']
    """

    name: str
    functions: dict[str, Callable[..., Any]]
    unbiased: bool | None = None


NOT_OF_VALUES = (TypeError, AttributeError, NameError, SystemExit)
"""Errors of a program that is wrong, whatever the values."""


class NotOfferedError(Exception):
    """The batch norm does not claim to do this."""


class UncallableError(ValueError):
    """It cannot be tried: what it needs is not there."""


class RefusedError(Exception):
    """It raised an error of its own.

    Attributes:
        about_values: whether the error may be about the values that it got.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(one_line(error))
        self.about_values = not isinstance(error, NOT_OF_VALUES)


class MalformedError(Exception):
    """What it returned is not what the contract says."""


def call(candidate: Candidate, name: str, vector: Vector) -> dict[str, np.ndarray]:
    """Run one of a candidate's functions on a vector's inputs; results by name, in float64.

    Raises:
        NotOfferedError: it has no such function, or not for masks or groups.
        RefusedError: it raised an error.
        UncallableError: it cannot import what it needs.
        MalformedError: it returned something else than numbers in the shapes of the contract.
    """
    function = candidate.functions.get(name)
    named = {k: v for k, v in vector.inputs.items() if k in NAMED}
    if function is None or not takes(function, named):
        raise NotOfferedError(name if function is None else f"{name} with {', '.join(named)}")
    positional, results = FUNCTIONS[name]
    inputs = {k: prepared(k, vector) for k in (*positional, *named)}
    kept = {k: np.array(v, copy=True) for k, v in inputs.items() if isinstance(v, np.ndarray)}
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            returned = function(*(inputs[k] for k in positional), **{k: inputs[k] for k in named})
    except NotImplementedError as error:
        raise NotOfferedError(one_line(error)) from error
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name
        reason = f"{absent} is not installed" if absent else one_line(error)
        raise UncallableError(f"{candidate.name}: {reason}") from error
    except (Exception, SystemExit) as error:
        raise RefusedError(error) from error
    for key, before in kept.items():
        if before.tobytes() != np.asarray(inputs[key]).tobytes():
            raise MalformedError(f"{name} changes its argument {key} in place")
    return read(name, results, returned, vector)


def can_take(function: Callable[..., Any], positional: Sequence[str]) -> bool:
    """Whether a function can be called with so many arguments, as far as its signature is known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*positional)
    except TypeError:
        return False
    return True


def takes(function: Callable[..., Any], named: Mapping[str, Any]) -> bool:
    """Whether a function has parameters of these names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return not named
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return anything or set(named) <= {p.name for p in parameters}


def prepared(name: str, vector: Vector) -> Any:
    """An input as the function gets it: data in the vector's dtype, parameters in float32."""
    value, dtype = vector.inputs[name], dtype_of(vector.dtype)
    if name == "batches":
        features = np.shape(value[0])[-1]
        return [np.asarray(x).astype(dtype).reshape(-1, features) for x in value]
    if name == "masks":
        return [np.array(mask, bool) for mask in value]
    if name == "groups":
        return [[int(member) for member in group] for group in value]
    if name == "mask":
        return np.array(value, bool)
    if isinstance(value, np.ndarray):
        return value.astype(dtype if name in ("x", "dy") else np.float32)
    return float(value)


def read(
    name: str, results: tuple[str, ...], returned: Any, vector: Vector
) -> dict[str, np.ndarray]:
    """Results by name, once their number, their types and shapes are those of the contract."""
    if len(results) == 1 and not isinstance(returned, tuple | list):
        returned = (returned,)
    wanted = ", ".join(results)
    if not isinstance(returned, tuple | list) or len(returned) != len(results):
        count = len(returned) if isinstance(returned, tuple | list) else type(returned).__name__
        raise MalformedError(f"{name} must return {wanted}; it returned {count}")
    x = vector.inputs["x" if "x" in vector.inputs else "batches"]
    features = np.shape(x)[-1:] if "x" in vector.inputs else np.shape(x[0])[-1:]
    each = np.shape(x)[:1] + features if name == "sharded" else features
    found = {}
    for key, value in zip(results, returned, strict=True):
        try:
            array = np.asarray(value)
            if array.dtype.kind not in "biufV" or array.dtype.names:
                raise TypeError(f"it has dtype {array.dtype}")
            array = array.astype(np.float64)
        except Exception as error:
            raise MalformedError(
                f"{key} is not an array of real numbers: {one_line(error)}"
            ) from error
        shape = np.shape(x) if key in ("y", "dx") else each
        if array.shape != shape:
            hint = ""
            if key in ("mean", "var") and array.shape == np.shape(x)[:1] != features:
                hint = ": one value per example; it normalizes over the wrong axis"
            raise MalformedError(f"{name} returned {key} of shape {array.shape}, not {shape}{hint}")
        found[key] = array
    return found


def one_line(error: BaseException) -> str:
    """An error's type and the start of its message, without line breaks or control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
