"""Moments form a commutative monoid: merge is associative and commutative, count 0 its identity.

Means are stored rounded, each off by up to half a unit in its last place. The difference δ of two
means is then off by up to one, and p q δ² ≤ σ² (it is a part of it), so merged variances are off by
up to σ·ulp(μ): relative to σ², ulp(μ)/σ. That cannot be had better from stored means; pooling
inside `batch_norm` does not store them (`test_accuracy.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import bn_jax as bn
from bn_jax.conform import oracle
from tests.core.draws import batches, labels, laws

pytestmark = pytest.mark.optimized

M, C = 24, 3
measure, merge = jax.jit(bn.measure), jax.jit(bn.merge)
NOTHING = bn.Moments(*jnp.zeros((3, C)))


def parts_of(x, label, parts=3):
    return [measure(x, where=label == part) for part in range(parts)]


def assert_same_moments(a, b, x):
    size = np.abs(x).max()
    ulp = np.spacing(np.float32(size))
    std = np.sqrt(np.asarray(b.var, np.float64))
    np.testing.assert_array_equal(a.count, b.count)
    np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=4 * ulp)
    # Two roundings of the means at each of up to three merges, and the arithmetic's own few u.
    slack = 3 * (std + ulp) * ulp + 16 * oracle.U * std**2
    assert (np.abs(np.asarray(a.var, np.float64) - b.var) <= slack).all(), (a.var, b.var, slack)


@laws
@given(batches((M, C)), labels(M, 2))
def test_merge_is_commutative(x, label):
    a, b = parts_of(x, label, 2)
    assert_same_moments(merge(a, b), merge(b, a), x)


@laws
@given(batches((M, C)), labels(M, 3))
def test_merge_is_associative(x, label):
    a, b, c = parts_of(x, label)
    assert_same_moments(merge(merge(a, b), c), merge(a, merge(b, c)), x)


@laws
@given(batches((M, C)))
def test_nothing_is_the_identity_on_either_side(x):
    moments = measure(x)
    for merged in merge(moments, NOTHING), merge(NOTHING, moments):
        jax.tree.map(np.testing.assert_array_equal, merged, moments)


def test_nothing_and_nothing_is_nothing():
    jax.tree.map(np.testing.assert_array_equal, merge(NOTHING, NOTHING)[:3], NOTHING[:3])


def test_measuring_nothing_gives_the_identity():
    for nothing in (
        bn.measure(jnp.zeros((0, C))),
        bn.measure(jnp.full((M, C), jnp.nan), where=jnp.zeros(M, bool)),
        bn.measure(jnp.full((M, C), jnp.inf), where=jnp.zeros(M)),
    ):
        jax.tree.map(np.testing.assert_array_equal, nothing[:3], NOTHING[:3])


@laws
@given(batches((M, C)), labels(M, 3))
def test_measuring_the_union_is_merging_the_measures(x, label):
    a, b, c = parts_of(x, label)
    assert_same_moments(merge(merge(a, b), c), measure(x), x)


@laws
@given(batches((M, C)), labels(M, 3))
def test_pooling_over_an_axis_is_merging_its_members(x, label):
    members = jax.tree.map(lambda *parts: jnp.stack(parts), *parts_of(x, label))
    pooled = jax.vmap(lambda moments: bn.pool(moments, "parts"), axis_name="parts")(members)
    for member in range(3):
        assert_same_moments(jax.tree.map(lambda part, n=member: part[n], pooled), measure(x), x)


def test_importances_merge_with_their_squares():
    """With each other, pooled, and with values that count as one each."""
    random = np.random.default_rng(1)
    x, w = random.standard_normal((M, C)).astype(np.float32), random.uniform(0, 2, M)
    w = w.astype(np.float32)
    whole = bn.measure(x, where=w)
    np.testing.assert_allclose(whole.squares, np.full(C, np.square(w).sum()), rtol=1e-6)
    halves = [bn.measure(x[part], where=w[part]) for part in (slice(9), slice(9, M))]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *halves)
    pooled = jax.vmap(lambda moments: bn.pool(moments, "i"), axis_name="i")(stacked)
    for moments in bn.merge(*halves), jax.tree.map(lambda part: part[1], pooled):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), moments, whole)
    mixed = bn.merge(bn.measure(x), whole)
    np.testing.assert_allclose(mixed.squares, M + whole.squares, rtol=1e-6)
    np.testing.assert_allclose(bn.merge(whole, bn.measure(x)).squares, mixed.squares, rtol=1e-6)


@laws
@given(batches((M, C)), labels((M, C), 4))
def test_measure_is_the_oracle_with_weights(x, weights):
    moments = measure(x, where=jnp.asarray(weights, jnp.float32))
    truth = oracle.forward(x, weights=weights)
    # The mean to 2 ulp of the values, the variance to the bar of 1e-6; what is smaller than the
    # smallest normal float32 may be flushed to zero.
    ulp = np.spacing(np.abs(x).max(0))
    np.testing.assert_array_equal(moments.count, truth.count)
    assert (np.abs(moments.mean - truth.mean) <= 2 * ulp).all()
    assert (np.abs(moments.var - truth.var) <= 1e-6 * truth.var + 1e-37).all()


@pytest.mark.parametrize("sizes", [(1, 1000), (1000, 1), (1, 1), (17, 30)])
def test_merging_a_few_values_far_away_with_many(sizes, seed=3):
    random = np.random.default_rng(seed)
    parts = [
        (where + random.standard_normal((size, C))).astype(np.float32)
        for where, size in zip((0.0, 1e4), sizes, strict=True)
    ]
    merged = bn.merge(*map(bn.measure, parts))
    truth = oracle.forward(np.concatenate(parts))
    np.testing.assert_allclose(merged.mean, truth.mean, rtol=4 * oracle.U)
    np.testing.assert_allclose(merged.var, truth.var, rtol=1e-6)


def test_complex_moments_merge_too():
    random = np.random.default_rng(5)
    x = (random.standard_normal((M, C)) + 1j * random.standard_normal((M, C))).astype(np.complex64)
    merged = bn.merge(bn.measure(x[:5]), bn.measure(x[5:]))
    truth = oracle.forward(x)
    assert merged.var.dtype == jnp.float32
    np.testing.assert_allclose(merged.mean, truth.mean, rtol=1e-6)
    np.testing.assert_allclose(merged.var, truth.var, rtol=1e-6)
