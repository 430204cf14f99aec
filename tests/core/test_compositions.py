"""What is composed from public parts is as accurate as `batch_norm`, and the same where it can be.

Each composition ends in y and moments, which have to meet the accuracy bars against float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bn_jax as bn
from bn_jax.conform import oracle
from bn_jax.conform.bars import errors, nominal_bars, normal
from tests.core.draws import few, seeds

pytestmark = pytest.mark.optimized

FEATURES = 16
PARAMS, STATE = bn.init(FEATURES)
M = 96


def by_moments(x, moments):
    y = bn.normalize(x, moments.mean, moments.var, PARAMS, rest=moments.rest)
    return y, moments


def measured(x):
    return by_moments(x, bn.measure(x))


def merged(x):
    """Four uneven parts, merged in pairs."""
    parts = [bn.measure(part) for part in jnp.split(x, (3, 40, 41))]
    return by_moments(x, bn.merge(bn.merge(*parts[:2]), bn.merge(*parts[2:])))


def pooled(x):
    parts = x.reshape(4, -1, FEATURES)
    member = lambda x: by_moments(x, bn.pool(bn.measure(x), "i"))  # noqa: E731
    y, moments = jax.vmap(member, axis_name="i")(parts)
    return y.reshape(x.shape), jax.tree.map(lambda part: part[0], moments)


def streamed(x):
    """Twelve micro-batches by scan, from the identity."""
    parts = x.reshape(12, -1, FEATURES)
    nothing = jax.tree.map(jnp.zeros_like, bn.measure(parts[0]))
    moments, _ = jax.lax.scan(lambda seen, x: (bn.merge(seen, bn.measure(x)), None), nothing, parts)
    return by_moments(x, moments)


def two_batches(x):
    """CrossQ: two batches that are normalized together; each is standardized alone as well."""
    (_, first), (_, second) = (bn.standardize(part, PARAMS) for part in jnp.split(x, 2))
    return by_moments(x, bn.merge(first, second))


def standardized(x):
    return bn.standardize(x, PARAMS)


WAYS = [measured, merged, pooled, streamed, two_batches, standardized]


@functools.partial(jax.jit, static_argnums=0)
def step(way, x, dy):
    y, pullback, moments = jax.vjp(way, x, has_aux=True)
    return y, moments, *pullback(dy)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@few
@given(seed=seeds, offset=st.sampled_from([0.0, 1e2, 1e3, 1e4, 1e5]))
def test_every_composition_meets_the_bars(way, seed, offset):
    x, dy = normal(M, FEATURES, offset, seed=seed)
    y, moments, dx = step(way, x, dy)
    zero = np.zeros(FEATURES)
    found = oracle.Outcome(y, dx, zero, zero, moments.mean, moments.var)
    off = errors(found, *oracle.step(x, dy), dy, offset)
    for quantity in ("y", "var", "mean", "dx"):
        assert off[quantity] <= nominal_bars(offset)[quantity], quantity


@pytest.mark.parametrize("options", [{}, {"where": np.arange(M) % 3}, {"group_size": 7}], ids=str)
def test_training_is_standardize_then_advance(options):
    x, _ = normal(M, FEATURES, 1e4)
    average = bn.DebiasedEma(0.9)
    y, state = bn.batch_norm(x, PARAMS, STATE, train=True, average=average, **options)
    same, moments = bn.standardize(x, PARAMS, **options)
    np.testing.assert_array_equal(same, y)
    jax.tree.map(np.testing.assert_array_equal, bn.advance(STATE, moments, average), state)


def test_mean_and_rest_are_the_exact_mean():
    """To within double precision's own sum; the mean alone is rounded to float32."""
    x, _ = normal(M, FEATURES, 1e4)
    moments = jax.jit(bn.measure)(x)
    exact = np.asarray(x, np.float64).mean(0)
    pair = np.asarray(moments.mean, np.float64) + np.asarray(moments.rest, np.float64)
    np.testing.assert_allclose(pair, exact, rtol=0, atol=2e-7)  # of a standard deviation of 1
    assert np.abs(np.asarray(moments.mean, np.float64) - exact).max() > 1e-5


def test_moments_of_three_numbers_still_work():
    x, _ = normal(M, FEATURES, 3.0)
    full = bn.measure(x)
    plain = bn.Moments(full.mean, full.var, full.count)
    both = bn.merge(plain, plain)
    np.testing.assert_allclose(both.mean, full.mean, rtol=1e-6)
    np.testing.assert_allclose(both.var, full.var, rtol=1e-6)
    bn.advance(STATE, plain, bn.Ema(0.9))
    np.testing.assert_allclose(by_moments(x, plain)[0], by_moments(x, full)[0], atol=1e-6)


def test_states_of_several_domains_are_indexed(domains=3):
    """A leading axis over domains; each batch moves its own domain's statistics only."""
    x, _ = normal(M, FEATURES, 1.0)
    states = jax.tree.map(lambda a: jnp.stack([a] * domains), STATE)

    @jax.jit
    def train(states, x, domain):
        own = jax.tree.map(lambda a: a[domain], states)
        y, own = bn.batch_norm(x, PARAMS, own, train=True)
        return y, jax.tree.map(lambda a, new: a.at[domain].set(new), states, own)

    _, states = train(states, x, 1)
    alone = bn.batch_norm(x, PARAMS, STATE, train=True)[1]
    for domain in range(domains):
        expected = alone if domain == 1 else STATE
        for found, wanted in zip(states, expected, strict=True):
            np.testing.assert_allclose(found[domain], wanted, rtol=1e-6)


def test_several_averages_of_one_run():
    """Training does not read the state, so several averages cost one pass over the data."""
    x, _ = normal(M, FEATURES, 1.0)
    decays = jnp.array([0.5, 0.9, 0.99])
    states = jax.tree.map(lambda a: jnp.stack([a] * 3), STATE)
    _, moments = bn.standardize(x, PARAMS)
    advance = lambda state, decay: bn.advance(state, moments, bn.Ema(decay))  # noqa: E731
    found = jax.vmap(advance)(states, decays)
    for at, decay in enumerate(decays.tolist()):
        wanted = bn.batch_norm(x, PARAMS, STATE, train=True, average=bn.Ema(decay))[1]
        for several, one in zip(found, wanted, strict=True):
            np.testing.assert_allclose(several[at], one, rtol=1e-6)
