"""The order of an epoch: a permutation, and as random as one may ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.batches import shuffled


def order_of(key, count):
    return shuffled(jnp.arange(count), key, count)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000, 60_000, 65_536, 65_537])
def test_every_number_once(count):
    assert np.array_equal(np.sort(order_of(jax.random.key(count), count)), np.arange(count))


def test_any_places_can_be_asked_for():
    key, places = jax.random.key(3), jnp.array([59_999, 5, 5, 31_000])
    np.testing.assert_array_equal(shuffled(places, key, 60_000), order_of(key, 60_000)[places])


def test_all_orders_are_equally_likely():
    """χ² over the 24 orders of 4 numbers; 23 degrees of freedom exceed 58 once in 10,000 times."""
    draws = 24_000
    keys = jax.random.split(jax.random.key(0), draws)
    orders = jax.jit(jax.vmap(lambda key: order_of(key, 4)))(keys)
    _, seen = np.unique(np.asarray(orders @ jnp.array([64, 16, 4, 1])), return_counts=True)
    assert len(seen) == 24
    assert np.sum((seen - draws / 24) ** 2 / (draws / 24)) < 58


def test_every_number_may_come_anywhere():
    """χ² over number × place in tenths, 60,000 numbers; 81 degrees exceed 137 once in 10,000."""
    order = np.asarray(order_of(jax.random.key(2), 60_000))
    seen = np.histogram2d(np.arange(60_000), order, bins=10)[0]
    assert np.sum((seen - 600) ** 2 / 600) < 137


def test_neighbours_keep_no_order():
    """Of the numbers n and n+1, which comes first is a fair coin.

    The share of pairs in order is 1/2 within 5 standard deviations, √(n/12)/n for neighbours (each
    shares a number with the next).
    """
    order = np.asarray(order_of(jax.random.key(1), 60_000))
    position = np.argsort(order)
    in_order = np.mean(position[:-1] < position[1:])
    assert abs(in_order - 0.5) < 5 * np.sqrt(60_000 / 12) / 60_000
    assert np.mean(np.abs(order[1:] - order[:-1]) == 1) < 10 / 60_000
