"""Checks the values of a checkpoint: only arrays of finite numbers pass.

It refuses, for example, a pickle where an array belongs, a negative variance, or a variance that
was too large for float16. Every error names the key, what was found there, and what to do about it.
Nothing is ever unpickled.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np


class CheckpointError(ValueError):
    """A value in a checkpoint, or in a state to be converted, does not fit a batch norm.

    The message names the key, what was found there, and what to do about it.

    >>> raise CheckpointError("bn1.weight: is missing; pass the whole state_dict")
    Traceback (most recent call last):
    bn_jax.interop.checks.CheckpointError: bn1.weight: is missing; pass the whole state_dict
    """


def checkpoint_error(key: str, found: str, remedy: str) -> CheckpointError:
    """A CheckpointError about one key, for the caller to raise.

    >>> str(checkpoint_error("bn1.weight", "is missing", "pass the whole state_dict"))
    'bn1.weight: is missing; pass the whole state_dict'
    """
    return CheckpointError(f"{key}: {found}; {remedy}")


def read_array(key: str, value: Any) -> np.ndarray:
    """Convert an array, tensor or variable of any framework to numpy, in its own dtype.

    Two things change: a long double becomes a double, because JAX has none, and bytes are put in
    this machine's order.

    Args:
        key: for messages.
        value: anything numpy accepts, a torch tensor (also bfloat16, on any device), an nnx
            variable, or a boxed value of flax.

    Raises:
        CheckpointError: value is not an array of numbers, but None, bytes, text, objects or rows of
            unequal length; or it has masked values.

    >>> read_array("bn.mean", [0.5, 1.0]).tolist()
    [0.5, 1.0]
    """
    if value is None:
        raise checkpoint_error(
            key, "is None", "an array of numbers belongs here; leave the key out if there is none"
        )
    if isinstance(value, bytes | bytearray | memoryview | str):
        raise checkpoint_error(
            key,
            f"is {type(value).__name__}, not an array",
            "nothing is unpickled or parsed here: load it with its own library and pass arrays",
        )
    try:
        if hasattr(value, "unbox"):  # flax's Partitioned
            value = value.unbox()
        if hasattr(value, "detach"):  # a torch tensor; numpy has no bfloat16 of its own
            value = value.detach().cpu()
            value = value.resolve_conj().resolve_neg()
            half = str(value.dtype) == "torch.bfloat16"
            value = value.float().numpy().astype(jnp.bfloat16) if half else value.numpy()
        elif hasattr(value, "get_value"):  # an nnx variable
            value = value.get_value()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise checkpoint_error(
            key, f"is not an array ({error})", "pass an array of numbers, e.g. jnp.asarray(values)"
        ) from error
    if np.ma.is_masked(value):
        raise checkpoint_error(
            key,
            f"has {np.ma.count_masked(value)} masked values of {array.size}",
            "masked values are unknown: pass value.filled(number), or an array without a mask",
        )
    if not jnp.issubdtype(array.dtype, jnp.number) or array.dtype.kind == "m":  # a time span
        raise checkpoint_error(
            key,
            f"is {type(value).__name__} of dtype {array.dtype}, not an array of numbers",
            "objects may hide a pickle and are not opened: load them with their own library and "
            "pass arrays of floats",
        )
    doubles = {np.dtype(np.longdouble): np.float64, np.dtype(np.clongdouble): np.complex128}
    native = array.dtype.newbyteorder("=")
    return array.astype(doubles.get(native, native), copy=False)


def read_statistic(key: str, value: Any, *, positive: bool = False) -> np.ndarray:
    """Read an array of finite floats; with `positive`, real and not negative, as a variance is.

    Raises:
        CheckpointError: value is anything else.

    >>> read_statistic("bn.var", np.array([-1.0], np.float32), positive=True)
    Traceback (most recent call last):
    bn_jax.interop.checks.CheckpointError: bn.var: is -1.0 for feature 0 of 1; ...
    """
    array = read_array(key, value)
    if not jnp.issubdtype(array.dtype, jnp.floating if positive else jnp.inexact):
        raise checkpoint_error(
            key,
            f"has dtype {array.dtype}",
            "one floating-point number per feature belongs here, e.g. float32; check that it was "
            "not quantized and is not the value of another entry",
        )
    # float64 becomes float32 here unless jax_enable_x64 is set; values that overflow are refused.
    found = array
    with np.errstate(over="ignore"):
        array = np.asarray(jnp.asarray(found))
    bad = ~np.isfinite(array)
    remedy = why_not_finite(found, array)
    if positive and not bad.any():
        bad = array < 0
        remedy = "no variance is negative: check that it is not another entry's, or a logarithm"
    if bad.any():
        raise checkpoint_error(
            key,
            f"is {found[bad][0]} for feature {np.flatnonzero(bad.ravel())[0]} of {array.size}",
            remedy,
        )
    return array


def why_not_finite(found: np.ndarray, array: np.ndarray) -> str:
    """Why an array has values that are not finite, and what to do about it.

    Args:
        found: the array in the checkpoint.
        array: the same after conversion by JAX.

    >>> half = np.array([np.inf], np.float16)
    >>> why_not_finite(half, half)
    'float16 holds no more than 65504: save the statistics in float32, or measure them again'
    """
    most = float(jnp.finfo(array.dtype).max)
    if np.isfinite(found).all():
        return f"{array.dtype} holds no more than {most:.3g}: set jax_enable_x64, or rescale"
    if most < 1e6 and not np.isnan(found).any():
        return (
            f"{found.dtype} holds no more than {most:.6g}: save the statistics in float32, or "
            "measure them again"
        )
    return "training had diverged: take an earlier checkpoint, or measure the statistics again"


def read_mapping(key: str, value: Any, remedy: str) -> Mapping[Any, Any]:
    """Check that value is a mapping, such as a dict, and not a module, bytes or an array.

    Raises:
        CheckpointError: it is something else.

    >>> read_mapping("state_dict", {"a": 1}, "")
    {'a': 1}
    """
    if not isinstance(value, Mapping):
        raise checkpoint_error(key, f"is {type(value).__name__}, not a mapping of names", remedy)
    return value


def require(found: Mapping[str, Any], key: str, remedy: str) -> Any:
    """The value of a key that must be present.

    Raises:
        CheckpointError: it is missing.

    >>> require({"a": 1}, "a", "")
    1
    """
    if key not in found:
        raise checkpoint_error(key, f"is missing among {some(found)}", remedy)
    return found[key]


def refuse_extra(found: Iterable[str], known: Iterable[str], remedy: str) -> None:
    """Refuse keys that do not belong to a batch norm.

    Raises:
        CheckpointError: found has keys that are not known.

    >>> refuse_extra(["mean"], ["mean", "var"], "drop it")
    """
    extra = sorted(set(found) - set(known))
    if extra:
        raise checkpoint_error(some(extra), "is not an entry of a batch norm", remedy)


def some(keys: Iterable[Any], limit: int = 6) -> str:
    """The first few keys, for a message.

    >>> some("abcdefgh", limit=2), some([])
    ("'a', 'b' and 6 more", 'nothing')
    """
    listed = [repr(key) for key in keys]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more or "nothing"
