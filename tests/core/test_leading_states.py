"""States with a leading axis: domains, chosen by index or per example, and averages of one run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import bn_jax as bn
from bn_jax.explain import assert_independent

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (12, 2)).astype(np.float32)
DOMAIN = np.array([0, 2, 0, 0, 2, 2, 0, 2, 0, 0, 2, 0])  # of four; 1 and 3 have no examples
PARAMS, STATE = bn.init(2)
STATES = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), STATE)


def by_domain(x, states):
    def one(state, number):
        return bn.batch_norm(x, PARAMS, state, train=True, where=number == DOMAIN)

    ys, states = jax.vmap(one)(states, jnp.arange(4))
    return ys[DOMAIN, np.arange(len(x))], states


def test_a_domain_per_example_is_a_batch_per_domain():
    y, states = jax.jit(by_domain)(X, STATES)
    for number in range(4):
        mine = X[number == DOMAIN]
        state = jax.tree.map(lambda leaf, n=number: leaf[n], states)
        if not len(mine):
            jax.tree.map(np.testing.assert_array_equal, state, STATE)
            continue
        expected, expected_state = bn.batch_norm(mine, PARAMS, STATE, train=True)
        close(y[number == DOMAIN], expected)
        jax.tree.map(close, state, expected_state)


def test_domains_do_not_depend_on_each_other():
    """The examples of a domain on a leading axis: none moves the other domain's."""
    members = jnp.stack([X[DOMAIN == 0][:5], X[DOMAIN == 2][:5]])
    order = np.concatenate([np.flatnonzero(n == DOMAIN)[:5] for n in (0, 2)])

    def f(members):
        x = jnp.asarray(X).at[order].set(members.reshape(10, 2))
        return by_domain(x, STATES)[0][order].reshape(2, 5, 2)

    assert_independent(f, members)


def test_evaluation_by_the_domain_of_each_example():
    _, states = by_domain(X, STATES)
    chosen = jax.tree.map(lambda leaf: leaf[DOMAIN], states)
    y = jax.vmap(lambda x, state: bn.batch_norm(x, PARAMS, state, train=False)[0])(X, chosen)
    for number in (0, 2):
        state = jax.tree.map(lambda leaf, n=number: leaf[n], states)
        expected, _ = bn.batch_norm(X[number == DOMAIN], PARAMS, state, train=False)
        close(y[number == DOMAIN], expected)


def test_averages_of_one_run_are_those_of_many_runs():
    decays = np.float32([0.9, 0.99, 0.999])
    batches = RANDOM.normal(5, 3, (20, 8, 2)).astype(np.float32)

    @jax.jit
    def step(states, x):
        moments = bn.measure(x)
        one = lambda state, decay: bn.advance(state, moments, bn.DebiasedEma(decay))  # noqa: E731
        return jax.vmap(one)(states, decays)

    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(decays)), STATE)
    for x in batches:
        many = step(many, x)
    for n, decay in enumerate(decays):
        alone = STATE
        for x in batches:
            _, alone = bn.batch_norm(x, PARAMS, alone, train=True, average=bn.DebiasedEma(decay))
        jax.tree.map(close, jax.tree.map(lambda leaf, n=n: leaf[n], many), alone)
