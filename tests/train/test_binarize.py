"""Grey levels become the network's input: by a threshold, by chance, or as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.step import binarize

LEVELS = np.arange(256, dtype=np.uint8)
KEY = jax.random.key(0)


def test_the_threshold_is_exact():
    inputs = binarize(jnp.asarray(LEVELS), "threshold", KEY)
    np.testing.assert_array_equal(inputs, np.repeat([0.0, 1.0], 128))
    assert inputs.dtype == jnp.float32


def test_none_keeps_the_grey_levels():
    inputs = binarize(jnp.asarray(LEVELS), "none", KEY)
    np.testing.assert_allclose(inputs, LEVELS / 255, rtol=1e-7)
    assert inputs.dtype == jnp.float32


def test_stochastic_is_the_grey_level_on_average():
    draws = 4000
    inputs = binarize(jnp.asarray(np.tile(LEVELS, (draws, 1))), "stochastic", KEY)
    assert set(np.unique(inputs)) == {0, 1}
    assert inputs.dtype == jnp.float32
    chance = LEVELS / 255
    # Five σ of the mean of so many coins; black and white are certain.
    bound = 5 * np.sqrt(chance * (1 - chance) / draws)
    assert np.all(np.abs(np.mean(inputs, axis=0) - chance) <= bound)


def test_stochastic_depends_on_the_key_alone():
    grey = jnp.full((30, 30), 128, jnp.uint8)
    first, again = (binarize(grey, "stochastic", KEY) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != binarize(grey, "stochastic", jax.random.key(1)))


@pytest.mark.parametrize("binarization", ["threshold", "none"])
def test_the_others_draw_nothing(binarization):
    first, second = (binarize(jnp.asarray(LEVELS), binarization, jax.random.key(k)) for k in (0, 1))
    np.testing.assert_array_equal(first, second)
