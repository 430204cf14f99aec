"""States with a leading axis: domains, chosen by index or per example, and averages of one run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


# One run with several averages, as in .docs/recipes.md: the states of two layers, and the decays.

DECAYS = np.float32([0.9, 0.99, 0.999])
WEIGHTS = RANDOM.normal(0, 1, (2, 2, 2)).astype(np.float32)
NETWORK = [(WEIGHTS[0], PARAMS), (WEIGHTS[1], PARAMS)]
BATCHES = RANDOM.normal(5, 3, (8, 64, 2)).astype(np.float32)
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(DECAYS)), [STATE, STATE])


def step(normalizer, network, states, decay, x):
    """One step of gradient descent; the new network, and the new states."""

    def loss(network):
        y, new = x, []
        for (kernel, params), state in zip(network, states, strict=True):
            average = bn.DebiasedEma(decay)
            y, state = normalizer(y @ kernel, params, state, train=True, average=average)
            new, y = [*new, state], jnp.tanh(y)
        return jnp.mean(y**2), new

    grads, new = jax.grad(loss, has_aux=True)(network)
    return jax.tree.map(lambda p, g: p - 0.1 * g, network, grads), new


def together(normalizer=bn.batch_norm):
    return jax.vmap(partial(step, normalizer), (None, 0, 0, None), (None, 0))


def test_averages_of_one_run_are_those_of_many_runs():
    one, many = jax.jit(partial(step, bn.batch_norm)), jax.jit(together())
    network, states = NETWORK, STACKED
    alone = [(NETWORK, [STATE, STATE]) for _ in DECAYS]
    for x in BATCHES:
        network, states = many(network, states, DECAYS, x)
        runs = zip(alone, DECAYS, strict=True)
        alone = [one(*run, decay, x) for run, decay in runs]
    for n, (trained, expected) in enumerate(alone):
        jax.tree.map(close, network, trained)
        jax.tree.map(close, jax.tree.map(lambda s, n=n: s[n], states), expected)


def test_further_averages_cost_nothing_per_example():
    """The batch is normalized once: what two more averages cost does not depend on its size."""

    def operations(averages, examples):
        states = jax.tree.map(lambda leaf: leaf[:averages], STACKED)
        given = NETWORK, states, DECAYS[:averages], BATCHES[0][:examples]
        return jax.jit(together()).lower(*given).cost_analysis()["flops"]

    extra, extra_of_more = (operations(3, size) - operations(1, size) for size in (8, 64))
    assert extra == extra_of_more
    assert extra < operations(1, 64) / 10


def test_renorm_reads_the_running_statistics_so_jax_refuses():
    one_run = together(partial(bn.batch_renorm, r_max=3.0, d_max=5.0))
    with pytest.raises(ValueError, match="out_axes"):
        jax.eval_shape(one_run, NETWORK, STACKED, DECAYS, X)
