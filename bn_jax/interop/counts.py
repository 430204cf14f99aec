"""How many batches have the statistics seen? It decides what they weigh against the next batch.

Three instances: torch counts them, haiku divides by 1 - decayᵗ, keras keeps no count. A count of 0
says "new" to `DebiasedEma` and `CumulativeAverage`, which let the first batch replace the
statistics. So statistics that somebody loaded, and whose count is unknown or 0, count as
`bn_jax.core.averages.LOADED`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from bn_jax.core.averages import LOADED
from bn_jax.interop.checks import read_array, refusal, some


def read_count(key: str, value: Any) -> np.ndarray:
    """How many batches were seen: a whole number, or one per feature, as int32.

    Floats are what our Flax layers count in, so that whole states can be averaged.

    Raises:
        CheckpointError: it is not, is negative or above 2,147,483,647.

    >>> read_count("bn.num_batches_tracked", 7).tolist()
    7
    """
    array = read_array(key, value)
    limit = np.iinfo(np.int32).max
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    whole = np.issubdtype(array.dtype, np.integer) or (is_float and np.all(array == array // 1))
    if not whole or np.any((array < 0) | (array > limit)):
        raise refusal(
            key,
            f"is {array} of dtype {array.dtype}",
            f"a count of batches is an integer from 0 to {limit}; leave it out if it is unknown, "
            "and give `count` instead",
        )
    return array.astype(np.int32)


def read_one_count(key: str, value: Any) -> int:
    """The count of a library that keeps one number for all features.

    Raises:
        CheckpointError: it is no count, or there are several.

    >>> read_one_count("counter", np.array(3))
    3
    """
    count = read_count(key, value)
    if count.ndim:
        raise refusal(
            key,
            f"has shape {count.shape}",
            "one number belongs here: take one layer out of a stack of them first",
        )
    return int(count)


def long_seen(count: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """One count per feature, where loaded statistics whose count is 0 get `LOADED`.

    Loaded is what a new layer has not: a mean other than 0, a variance other than 1 or, as haiku
    starts, 0. One count for all features is 0 for all or for none; of one count per feature, each
    is looked at alone, since a feature may have skipped every batch.

    Args:
        count: one for all, or one per feature.
        mean: one per feature.
        var: likewise.

    >>> var = np.array([1.0, 4.0])
    >>> long_seen(np.array(0), np.zeros(2), var).tolist()
    [1000, 1000]
    >>> long_seen(np.array([0, 0]), np.zeros(2), var).tolist()
    [0, 1000]
    >>> long_seen(np.array(7), np.zeros(2), var).tolist()
    [7, 7]
    """
    loaded = (mean != 0) | ((var != 1) & (var != 0))
    if count.ndim == 0:
        loaded = np.full(mean.shape, loaded.any())
    return np.where((count == 0) & loaded, np.int32(LOADED), count).astype(np.int32)


def one_count(count: np.ndarray, given: int | None = None) -> int:
    """One count for a library that keeps no count per feature.

    Args:
        count: one per feature.
        given: goes before.

    Raises:
        CheckpointError: features differ, because some have skipped batches.

    >>> one_count(np.array([3, 3])), one_count(np.array([3, 4]), given=4)
    (3, 4)
    """
    if given is not None:
        return read_one_count("count", given)
    if count.size and np.ptp(count):
        raise refusal(
            "state.count",
            f"differs between features, {some(np.unique(count).tolist())}",
            "the other library keeps one number for all: give it as count=, e.g. the largest",
        )
    return int(count.flat[0]) if count.size else 0
