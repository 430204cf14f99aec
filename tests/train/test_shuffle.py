"""The order of an epoch: a permutation, and as random as one may ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.batches import shuffle


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000, 60_000, 65_536, 65_537])
def test_every_number_once(count):
    assert np.array_equal(np.sort(shuffle(jax.random.key(count), count)), np.arange(count))


def test_all_orders_are_equally_likely():
    """χ² over the 24 orders of 4 numbers; 23 degrees of freedom exceed 58 once in 10,000 times."""
    draws = 24_000
    keys = jax.random.split(jax.random.key(0), draws)
    orders = jax.jit(jax.vmap(lambda key: shuffle(key, 4)))(keys)
    _, seen = np.unique(np.asarray(orders @ jnp.array([64, 16, 4, 1])), return_counts=True)
    assert len(seen) == 24
    assert np.sum((seen - draws / 24) ** 2 / (draws / 24)) < 58


def test_ties_do_not_keep_neighbours_in_order():
    """With 60,000 numbers, a round has 16 random bits and many ties; rounds make up for them.

    Of the numbers n and n+1, which comes first is a fair coin: the share of pairs in order is 1/2
    within 5 standard deviations, √(n/12)/n for neighbours (each shares a number with the next).
    """
    order = np.asarray(shuffle(jax.random.key(1), 60_000))
    position = np.argsort(order)
    in_order = np.mean(position[:-1] < position[1:])
    assert abs(in_order - 0.5) < 5 * np.sqrt(60_000 / 12) / 60_000
    adjacent = np.mean(order[1:] == order[:-1] + 1)
    assert adjacent < 10 / 60_000
