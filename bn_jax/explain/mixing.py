"""The same examples in other batches: how much would batches differ by chance?

How many values in a batch are independent, its size does not tell: the pixels of an image are
alike, and so are its channels. Batches of the same examples, at random, have as many.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

TOGETHER = 16  # batches that are mixed at a time, and held in memory


def in_groups(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """The batches, some at a time."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, TOGETHER)):
        yield group


def mix(group: list[Any]) -> list[Any]:
    """The examples of some batches at random in other batches; none where that cannot be done.

    That is, of a single batch, or where arrays are of different lengths.
    """
    leaves = [jax.tree.leaves(batch) for batch in group]
    lengths = {np.shape(leaf)[:1] for batch in leaves for leaf in batch}
    if len(group) == 1 or len(lengths) > 1 or () in lengths:
        return []
    ((size,),) = lengths
    order = np.random.default_rng(0).permutation(size * len(group))

    def deal(*of_batches: Any) -> list[Any]:
        return np.split(np.concatenate(of_batches)[order], len(group))

    dealt = [deal(*of_batches) for of_batches in zip(*leaves, strict=True)]
    tree = jax.tree.structure(group[0])
    return [jax.tree.unflatten(tree, batch) for batch in zip(*dealt, strict=True)]
