"""Is this a batch norm's checkpoint? What is no array of finite numbers goes no further.

Three instances: a pickle where an array belongs, a negative variance, a scale of another length
than the mean. Every refusal names the key, what was found there, and what to do about it. Nothing
is ever unpickled.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bn_jax.core.averages import BatchNormState
from bn_jax.core.normalize import BatchNormParams


class CheckpointError(ValueError):
    """A checkpoint, or a state to be written, is not what a batch norm needs.

    The message says which key, what was found there, and what to do about it.
    """


def refusal(key: str, found: str, remedy: str) -> CheckpointError:
    """The error for a key, for the caller to raise.

    >>> str(refusal("bn1.weight", "is missing", "pass the whole state_dict"))
    'bn1.weight: is missing; pass the whole state_dict'
    """
    return CheckpointError(f"{key}: {found}; {remedy}")


def read_array(key: str, value: Any) -> np.ndarray:
    """An array, a tensor or a variable of any framework, as numpy, in its own dtype.

    Args:
        key: for messages.
        value: what numpy takes, a torch tensor (bfloat16 and on any device too), an nnx variable.

    Raises:
        CheckpointError: it is no array of numbers: bytes, text, objects, or of unequal rows.

    >>> read_array("bn.mean", [0.5, 1.0]).tolist()
    [0.5, 1.0]
    """
    if isinstance(value, bytes | bytearray | memoryview | str):
        raise refusal(
            key,
            f"is {type(value).__name__}, not an array",
            "nothing is unpickled or parsed here: load it with its own library, and pass arrays",
        )
    try:
        if hasattr(value, "detach"):  # a torch tensor; numpy has no bfloat16 of its own
            value = value.detach().cpu()
            half = str(value.dtype) == "torch.bfloat16"
            value = value.float().numpy().astype(jnp.bfloat16) if half else value.numpy()
        elif hasattr(value, "get_value"):  # an nnx variable
            value = value.get_value()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refusal(
            key, f"is no array ({error})", "pass an array of numbers, e.g. jnp.asarray(values)"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise refusal(
            key,
            f"is {type(value).__name__} of dtype {array.dtype}, not an array of numbers",
            "objects may hide a pickle and are not opened: load them with their own library, and "
            "pass arrays of floats",
        )
    return array


def read_statistic(key: str, value: Any, *, positive: bool = False) -> np.ndarray:
    """An array of finite floats; with `positive`, real and not below zero, as a variance is.

    Raises:
        CheckpointError: it is not.

    >>> read_statistic("bn.var", np.array([-1.0], np.float32), positive=True)
    Traceback (most recent call last):
    bn_jax.interop.checks.CheckpointError: bn.var: is -1.0 for feature 0 of 1; ...
    """
    array = read_array(key, value)
    if not jnp.issubdtype(array.dtype, jnp.floating if positive else jnp.inexact):
        raise refusal(
            key,
            f"has dtype {array.dtype}",
            "one number with fractions per feature belongs here, e.g. float32; was it quantized, "
            "or is it another entry's value?",
        )
    # float64 becomes float32 here unless jax_enable_x64 is set, and what overflows then is refused.
    with np.errstate(over="ignore"):
        array = np.asarray(jnp.asarray(array))
    bad = ~np.isfinite(array)
    remedy = "training had diverged: take an earlier checkpoint, or measure the statistics anew"
    if positive and not bad.any():
        bad = array < 0
        remedy = "no variance is negative: is this another entry's value, such as a logarithm?"
    if bad.any():
        raise refusal(
            key,
            f"is {array[bad][0]} for feature {np.flatnonzero(bad.ravel())[0]} of {array.size}",
            remedy,
        )
    return array


def read_count(key: str, value: Any) -> np.ndarray:
    """How many batches were seen: a non-negative integer, or one per feature, as int32.

    Raises:
        CheckpointError: it is not, or is above 2,147,483,647.

    >>> read_count("bn.num_batches_tracked", 7).tolist()
    7
    """
    array = read_array(key, value)
    limit = np.iinfo(np.int32).max
    if not jnp.issubdtype(array.dtype, jnp.integer) or np.any((array < 0) | (array > limit)):
        raise refusal(
            key,
            f"is {array} of dtype {array.dtype}",
            f"a count of batches is an integer from 0 to {limit}; leave it out if it is unknown, "
            "and give `count` instead",
        )
    return array.astype(np.int32)


def read_layer(
    values: Mapping[str, Any], keys: Mapping[str, str], *, count: Any = 0, vector: bool = True
) -> tuple[BatchNormParams, BatchNormState]:
    """Parameters and state of what was found.

    float64 becomes float32 unless jax_enable_x64 is set; nothing else is rounded.

    Args:
        values: `mean`, `var`, and where they exist `scale`, `bias`.
        keys: what each is called in the checkpoint, for messages; of `count` too.
        count: how many batches, one number or one per feature.
        vector: all must be of shape [features]; otherwise any shape that they share.

    Raises:
        CheckpointError: a value is malformed, or its shape differs from that of mean.

    >>> params, state = read_layer({"mean": [0.5], "var": [2.0]}, {}, count=3)
    >>> params, state.count.tolist()
    (BatchNormParams(scale=None, bias=None), [3])
    """
    keys = {name: keys.get(name, name) for name in (*values, "count")}
    arrays = {
        name: None if value is None else read_statistic(keys[name], value, positive=name == "var")
        for name, value in values.items()
    }
    arrays["count"] = read_count(keys["count"], count)
    mean = arrays["mean"]
    assert mean is not None
    if vector and mean.ndim != 1:
        raise refusal(
            keys["mean"],
            f"has shape {mean.shape}",
            "one value per feature belongs here, of shape [features]: reshape it",
        )
    if arrays["count"].ndim == 0:
        arrays["count"] = np.full(mean.shape, arrays["count"])
    for name, array in arrays.items():
        if array is not None and array.shape != mean.shape:
            raise refusal(
                keys[name],
                f"has shape {array.shape}, but {keys['mean']} {mean.shape}",
                "all hold one value per feature of one layer: are they of the same one?",
            )
    have = {name: None if array is None else jnp.asarray(array) for name, array in arrays.items()}
    params = BatchNormParams(have.get("scale"), have.get("bias"))
    return params, BatchNormState(have["mean"], have["var"], have["count"])  # pyright: ignore[reportArgumentType]


class Values(NamedTuple):
    """Our parameters and state as numpy, checked: what another library gets."""

    scale: np.ndarray | None
    bias: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]


def read_ours(params: BatchNormParams, state: BatchNormState, *, vector: bool = True) -> Values:
    """Our own values, checked likewise before another library gets them.

    Raises:
        CheckpointError: a value is malformed, or does not fit the others.

    >>> import bn_jax as bn
    >>> read_ours(*bn.init(2, use_bias=False)).count.tolist()
    [0, 0]
    """
    values = {**params._asdict(), "mean": state.mean, "var": state.var}
    keys = {name: f"{'params' if name in params._fields else 'state'}.{name}" for name in values}
    params, state = read_layer(
        values, keys | {"count": "state.count"}, count=state.count, vector=vector
    )
    return Values(
        None if params.scale is None else np.array(params.scale),
        None if params.bias is None else np.array(params.bias),
        *map(np.array, state),  # copies, since torch.from_numpy wants them writable
    )


def read_mapping(key: str, value: Any, remedy: str) -> Mapping[Any, Any]:
    """A mapping, such as a dict; not a module, a file's bytes or an array.

    Raises:
        CheckpointError: it is something else.

    >>> read_mapping("state_dict", {"a": 1}, "")
    {'a': 1}
    """
    if not isinstance(value, Mapping):
        raise refusal(key, f"is {type(value).__name__}, no mapping of names", remedy)
    return value


def require(found: Mapping[str, Any], key: str, remedy: str) -> Any:
    """The value of a key that must be there.

    Raises:
        CheckpointError: it is missing.

    >>> require({"a": 1}, "a", "")
    1
    """
    if key not in found:
        raise refusal(key, f"is missing among {some(found)}", remedy)
    return found[key]


def refuse_extra(found: Iterable[str], known: Iterable[str], remedy: str) -> None:
    """Refuse keys that a batch norm does not have.

    Raises:
        CheckpointError: found has keys that are not known.

    >>> refuse_extra(["mean"], ["mean", "var"], "drop it")
    """
    extra = sorted(set(found) - set(known))
    if extra:
        raise refusal(some(extra), "is no entry of a batch norm", remedy)


def some(keys: Iterable[Any], limit: int = 6) -> str:
    """The first few of them, for a message.

    >>> some("abcdefgh", limit=2), some([])
    ("'a', 'b' and 6 more", 'nothing')
    """
    listed = [repr(key) for key in keys]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more or "nothing"
