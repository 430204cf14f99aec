"""Which examples a step sees: whole epochs in an order of their own, however they are asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.batches import batch_indices, few_class_indices, shuffled

EPOCHS = 8
# (examples, batch size): with a remainder, without, one batch per epoch, one example per batch.
SIZES = [(10, 3), (12, 4), (7, 7), (5, 1)]
each_size = pytest.mark.parametrize(("examples", "batch_size"), SIZES)

compiled = jax.jit(batch_indices, static_argnames=("steps", "batch_size", "examples"))


def rows(examples, batch_size, steps, seed=0, start=0):
    return np.asarray(
        compiled(
            jax.random.key(seed),
            jnp.asarray(start, jnp.int32),
            steps=steps,
            batch_size=batch_size,
            examples=examples,
        )
    )


@functools.cache
def epochs_in_one_go(examples, batch_size, seed=0):
    """Of shape [epochs, steps, batch size]."""
    per_epoch = examples // batch_size
    indices = rows(examples, batch_size, EPOCHS * per_epoch, seed)
    return indices.reshape(EPOCHS, per_epoch, batch_size)


def test_a_place_that_is_none_ends_too():
    """Of 10 numbers, the place 23 is the place 3; it could be led around outside for ever."""
    key = jax.random.key(0)
    places = jnp.arange(30)
    got = np.asarray(jax.jit(shuffled, static_argnums=2)(places, key, 10))
    np.testing.assert_array_equal(got, np.tile(got[:10], 3))
    np.testing.assert_array_equal(np.sort(got[:10]), np.arange(10))


@each_size
def test_an_epoch_sees_no_example_twice(examples, batch_size):
    for epoch in epochs_in_one_go(examples, batch_size):
        seen = np.unique(epoch)
        assert seen.size == epoch.size == examples // batch_size * batch_size
        assert seen.min() >= 0
        assert seen.max() < examples


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 4), (7, 7), (5, 1)])
def test_without_a_remainder_an_epoch_is_a_permutation(examples, batch_size):
    for epoch in epochs_in_one_go(examples, batch_size):
        np.testing.assert_array_equal(np.sort(epoch, axis=None), np.arange(examples))


def test_what_is_left_over_changes():
    """10 examples in batches of 3: one waits, each time another."""
    left = {frozenset(range(10)).difference(epoch.flat) for epoch in epochs_in_one_go(10, 3)}
    assert len(left) > 1


@each_size
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_chunks_of_any_size_are_one_sequence(examples, batch_size, chunk):
    """Also where a chunk ends within an epoch, and where it spans several."""
    whole = epochs_in_one_go(examples, batch_size).reshape(-1, batch_size)
    starts = range(0, len(whole) - chunk + 1, chunk)
    chunks = [rows(examples, batch_size, chunk, start=start) for start in starts]
    np.testing.assert_array_equal(np.concatenate(chunks), whole[: len(starts) * chunk])


@each_size
def test_a_chunk_may_start_anywhere(examples, batch_size):
    whole = epochs_in_one_go(examples, batch_size).reshape(-1, batch_size)
    for start in range(len(whole) - 3):
        chunk = rows(examples, batch_size, 3, start=start)
        np.testing.assert_array_equal(chunk, whole[start : start + 3])


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 3), (12, 4)])
def test_seeds_and_epochs_have_orders_of_their_own(examples, batch_size):
    orders = [
        tuple(epoch.flat)
        for seed in range(3)
        for epoch in epochs_in_one_go(examples, batch_size, seed)
    ]
    # Of 9! orders or more, 24 draws hardly meet, and none is that of the files.
    assert len(set(orders)) == len(orders)
    assert tuple(range(len(orders[0]))) not in orders


def test_every_order_is_as_likely():
    """Three examples in 600 epochs: six orders, 100 times each, give or take five σ = 46."""
    orders, counts = np.unique(rows(3, 1, 1800).reshape(600, 3), axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(counts - 100).max() < 5 * np.sqrt(600 * (1 / 6) * (5 / 6))


LABELS = np.array([3, 0, 0, 5, 3, 0, 0, 5, 5, 0])  # 0: five, 3: two, 5: three


@functools.partial(jax.jit, static_argnames=("steps", "classes"))
def few(seed, start, steps, classes):
    return few_class_indices(jax.random.key(seed), start, steps, 6, LABELS, classes)


@pytest.mark.parametrize("classes", [1, 2])
def test_batches_of_few_classes(classes):
    """Of so many classes each, equally many examples of each; over time, all classes and examples.

    400 draws from the largest class, of 5 examples, miss one with p = 5·.8⁴⁰⁰ < 1e-38. A class is
    drawn 200·classes/3 times, give or take five σ ≤ 5·√(200/4).
    """
    indices = np.asarray(few(0, jnp.int32(0), 200, classes))
    drawn = np.array([np.unique(row, return_counts=True) for row in LABELS[indices]])
    assert drawn.shape == (200, 2, classes)
    assert (drawn[:, 1] == 6 // classes).all()
    _, counts = np.unique(drawn[:, 0], return_counts=True)
    assert np.abs(counts - 200 * classes / 3).max() < 5 * np.sqrt(200 / 4)
    assert {*indices.flat} == {*range(10)}
    # A function of key and step alone.
    np.testing.assert_array_equal(few(0, jnp.int32(7), 200, classes)[:193], indices[7:])
    assert (np.asarray(few(1, jnp.int32(0), 200, classes)) != indices).any()


@pytest.mark.parametrize(("batch_size", "classes"), [(6, 0), (6, 4), (5, 2)])
def test_batches_of_few_classes_need_equal_parts(batch_size, classes):
    with pytest.raises(ValueError, match=f"classes={classes}: must be a divisor of the batch size"):
        few_class_indices(jax.random.key(0), jnp.int32(0), 1, batch_size, LABELS, classes)
