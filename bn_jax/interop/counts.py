"""Converts the number of batches that running statistics have seen.

The count decides how much the statistics weigh against the next batch. torch keeps it, haiku uses
it to divide by 1 - decayᵗ, keras does not keep it. A count of 0 means "new" to `DebiasedEma` and
`CumulativeAverage`: the first batch replaces the statistics. So loaded statistics whose count is
unknown or 0 get the count `bn_jax.core.state.LOADED`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from bn_jax.core.state import LOADED
from bn_jax.interop.checks import checkpoint_error, read_array, some


def read_count(key: str, value: Any) -> np.ndarray:
    """Read a count of batches, or one per feature, as int32.

    Whole floats are accepted, because our Flax layers count in floats, so that whole states can be
    averaged.

    Raises:
        CheckpointError: it is not whole, negative, or above 2,147,483,647.

    >>> read_count("bn.num_batches_tracked", 7).tolist()
    7
    """
    array = read_array(key, value)
    limit = np.iinfo(np.int32).max
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    whole = np.issubdtype(array.dtype, np.integer) or (is_float and np.all(array == array // 1))
    if not whole or np.any((array < 0) | (array > limit)):
        raise checkpoint_error(
            key,
            f"is {array} of dtype {array.dtype}",
            f"a count of batches is an integer from 0 to {limit}; if it is unknown, leave it out "
            "and pass `count` instead",
        )
    return array.astype(np.int32)


def read_one_count(key: str, value: Any) -> int:
    """Read the count of a library that keeps one number for all features.

    Raises:
        CheckpointError: it is not a count, or there are several.

    >>> read_one_count("counter", np.array(3))
    3
    """
    count = read_count(key, value)
    if count.ndim:
        raise checkpoint_error(
            key,
            f"has shape {count.shape}",
            "one number belongs here: if layers are stacked, take out one of them first",
        )
    return int(count)


def count_loaded(count: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """One count per feature, with `LOADED` in place of 0 where statistics were loaded.

    Statistics were loaded if they are not those of a new layer: mean 0, variance 1 (or 0, as haiku
    starts). If there is one count for all features, one loaded feature is enough. If there is a
    count per feature, each is judged alone, because a feature may have skipped every batch.

    Args:
        count: one for all features, or one per feature.
        mean: one per feature.
        var: one per feature.

    >>> var = np.array([1.0, 4.0])
    >>> count_loaded(np.array(0), np.zeros(2), var).tolist()
    [1000, 1000]
    >>> count_loaded(np.array([0, 0]), np.zeros(2), var).tolist()
    [0, 1000]
    >>> count_loaded(np.array(7), np.zeros(2), var).tolist()
    [7, 7]
    """
    loaded = (mean != 0) | ((var != 1) & (var != 0))
    if count.ndim == 0:
        loaded = np.full(mean.shape, loaded.any())
    return np.where((count == 0) & loaded, np.int32(LOADED), count).astype(np.int32)


def one_count(count: np.ndarray, given: int | None = None) -> int:
    """One count for all features, for a library that keeps no count per feature.

    Args:
        count: one per feature.
        given: overrides it.

    Raises:
        CheckpointError: the counts differ, because some features have skipped batches.

    >>> one_count(np.array([3, 3])), one_count(np.array([3, 4]), given=4)
    (3, 4)
    """
    if given is not None:
        return read_one_count("count", given)
    if count.size and np.ptp(count):
        raise checkpoint_error(
            "state.count",
            f"differs between features, {some(np.unique(count).tolist())}",
            "the other library keeps one number for all: pass it as count=, e.g. the largest",
        )
    return int(count.flat[0]) if count.size else 0
