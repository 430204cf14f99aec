"""States of replicas as one, by what each has seen."""

from functools import partial

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from tests.devices import pmap

RANDOM = np.random.default_rng(0)
BATCHES = (RANDOM.standard_normal((3, 5, 8, 2)) * [1, 3] + [100, -7]).astype(np.float32)
close = partial(np.testing.assert_allclose, rtol=1e-5)


def remembered(batches):
    state = bn.init(2)[1]
    for x in batches:
        state = bn.advance(state, bn.measure(x), bn.CumulativeAverage(), unbiased=False)
    return state


def stack(*states):
    return jax.tree.map(lambda *parts: jnp.stack(parts), *states)


def test_replicas_of_one_batch_each_make_the_whole():
    """The variance between replicas counts: averaging variances would lose it."""
    replicas = [remembered([x]) for x in BATCHES[:, 0] + np.float32([[[0]], [[5]], [[-5]]])]
    data = np.concatenate(BATCHES[:, 0] + np.float32([[[0]], [[5]], [[-5]]]))
    pooled = bn.pool_states(stack(*replicas))
    whole = bn.measure(data)
    close(pooled.mean, whole.mean)
    close(pooled.var, whole.var)
    np.testing.assert_array_equal(pooled.count, [3, 3])


def test_by_counts():
    """A replica that has seen nothing has no say; one that has seen more has more."""
    one, four, none = remembered(BATCHES[0][:1]), remembered(BATCHES[1][:4]), remembered([])
    pooled = bn.pool_states(stack(one, four, none))
    mean = (np.float64(one.mean) + 4 * np.float64(four.mean)) / 5
    parts = [(1, one), (4, four)]
    var = sum(n * (np.float64(s.var) + (s.mean - mean) ** 2) for n, s in parts) / 5
    close(pooled.mean, mean)
    close(pooled.var, var)
    np.testing.assert_array_equal(pooled.count, [5, 5])


def test_what_no_replica_has_seen_stays_as_it_is():
    _, state = bn.init(2)
    jax.tree.map(np.testing.assert_array_equal, bn.pool_states(stack(state, state)), state)


def test_what_pmap_returns():
    def replica(x):
        return bn.batch_norm(x, *bn.init(2), train=True, unbiased=False)[1]

    pooled = jax.jit(bn.pool_states)(pmap(replica)(BATCHES[:, 0]))
    whole = bn.measure(BATCHES[:, 0].reshape(-1, 2))
    close(pooled.mean, whole.mean)
    close(pooled.var, whole.var)


@pytest.mark.parametrize("kind", [dict, flax.core.FrozenDict])
def test_batch_stats_of_flax(kind):
    """Without counts, all replicas weigh the same; the tree keeps its shape."""
    states = [remembered([x]) for x in BATCHES[:, 0]]
    layers = [kind({"block": kind({"norm": kind({"mean": s.mean, "var": s.var})})}) for s in states]
    pooled = bn.pool_states(stack(*layers))
    assert jax.tree.structure(pooled) == jax.tree.structure(layers[0])
    expected = bn.pool_states(stack(*states))
    close(pooled["block"]["norm"]["mean"], expected.mean)
    close(pooled["block"]["norm"]["var"], expected.var)


def test_pooled_statistics_are_float32_at_least():
    state = jax.tree.map(lambda part: part, remembered(BATCHES[0]))
    half = state._replace(mean=state.mean.astype(jnp.bfloat16), var=state.var.astype(jnp.bfloat16))
    pooled = bn.pool_states(stack(half, half))
    assert [part.dtype for part in pooled] == [jnp.float32, jnp.float32, jnp.int32]
    jax.tree.map(np.testing.assert_array_equal, pooled[:2], half[:2])


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (bn.BatchNormState(*jnp.zeros((3, 0, 4))), ValueError, r"mean has shape \(0, 4\)"),
        (bn.init(4)[1], ValueError, r"mean has shape \(4,\), but needs \[replicas, features\]"),
        ([bn.init(4)[1], bn.init(4)[1]], ValueError, "stack the replicas' states"),
        ({"kernel": jnp.ones((2, 3))}, TypeError, "belongs to no state"),
        ({"mean": jnp.ones(2), "var": jnp.ones(2), "kernel": jnp.ones(2)}, TypeError, "no state"),
    ],
)
def test_what_is_no_state(states, error, message):
    with pytest.raises(error, match=message):
        bn.pool_states(states)
