"""New states for a network of functions, and moments in the place of a state."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn

SIZES = (2, 2, 4, 8, 16, 32, 64)
RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(0, 0.5, (3, 4)).astype(np.float32)
close = partial(np.testing.assert_allclose, rtol=1e-6)


def draw(sizes, mean=0.0, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(mean, 1, (m, 3)).astype(np.float32) for m in sizes]


def forward(params, states, x):
    """Two layers, written without a thought of recalibration."""
    kernel, norms = params
    y, first = bn.batch_norm(x, norms[0], states["first"], train=True)
    _, second = bn.batch_norm(y @ kernel, norms[1], states["second"], train=True)
    return {"first": first, "second": second}


PARAMS = jnp.asarray(KERNEL), [bn.init(3)[0], bn.init(4)[0]]
STATES = {"first": bn.init(3)[1], "second": bn.init(4)[1]}


def statistics(batches, estimator):
    if estimator == "pooled":
        values = np.concatenate(batches)
        return values.mean(0), values.var(0, ddof=1)
    return np.mean([x.mean(0) for x in batches], 0), np.mean([x.var(0, ddof=1) for x in batches], 0)


@pytest.mark.parametrize("estimator", ["pooled", "paper"])
@pytest.mark.parametrize("center", [0.0, 1e4])
def test_the_statistics_of_the_data_whatever_the_split(estimator, center):
    for sizes in (SIZES, SIZES[::-1]):
        batches = draw(sizes, center)
        states = bn.recalibrate(forward, PARAMS, STATES, iter(batches), estimator=estimator)
        first = [np.float64(x) for x in batches]
        second = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) @ np.float64(KERNEL) for x in first]
        # The second layer sees what the first makes of each batch, in float32.
        for name, data, rounding in (("first", first, 1e-6), ("second", second, 4e-6)):
            mean, var = statistics(data, estimator)
            np.testing.assert_allclose(states[name].mean, mean, rtol=1e-7, atol=rounding)
            np.testing.assert_allclose(states[name].var, var, rtol=rounding)
            np.testing.assert_array_equal(states[name].count, [len(sizes)] * len(mean))


def test_moments_in_the_place_of_a_state_forget_nothing():
    batches = draw((4, 9, 2))
    params = PARAMS[1][0]
    seen = jax.tree.map(jnp.zeros_like, bn.measure(batches[0]))
    for x in batches:
        y, seen = bn.batch_norm(x, params, seen, train=True)
        close(y, bn.batch_norm(x, params, STATES["first"], train=True)[0])
    expected = reduce(bn.merge, map(bn.measure, batches))
    for found, true in zip(seen[:3], expected[:3], strict=True):
        np.testing.assert_allclose(found, true, rtol=1e-6, atol=1e-7)
    # They are statistics to evaluate by, too.
    y, same = bn.batch_norm(batches[0], params, seen, train=False)
    close(y, bn.normalize(batches[0], seen.mean, seen.var, params))
    assert same is seen
    gradient = jax.grad(lambda x: bn.batch_norm(x, params, seen, train=True)[1].var.sum())
    assert not gradient(jnp.asarray(batches[0])).any()


def test_a_layer_that_is_used_twice_sees_both():
    def twice(params, state, x):
        _, state = bn.batch_norm(x, params, state, train=True)
        return bn.batch_norm(5 * x + 1, params, state, train=True)[1]

    batches = draw((4, 8))
    state = bn.recalibrate(twice, PARAMS[1][0], STATES["first"], batches)
    both = [np.float64(part) for x in batches for part in (x, 5 * x + 1)]
    mean, var = statistics(both, "pooled")
    np.testing.assert_allclose(state.mean, mean, atol=1e-6)
    close(state.var, var)


def test_masks_scans_and_what_has_seen_nothing():
    """A scan needs moments of one structure from the first step on, with weights too."""
    batches = draw((6, 6))
    old = STATES["first"]._replace(mean=jnp.full(3, 7.0), var=jnp.full(3, 8.0))
    mask = np.array([[1, 0, 1]] * 5 + [[0, 0, 1]], np.float32)

    def scanned(params, state, x):
        def step(state, x):
            return bn.batch_norm(x, params, state, train=True, where=mask)[1], None

        return jax.lax.scan(step, state, jnp.stack([x, 2 * x]))[0]

    state = bn.recalibrate(scanned, PARAMS[1][0], old, batches)
    data = [np.float64(part) for x in batches for part in (x, 2 * x)]
    close(state.var[0], statistics([x[:5, :1] for x in data], "pooled")[1][0])
    close(state.var[2], statistics([x[:, 2:] for x in data], "pooled")[1][0])
    assert (state.mean[1], state.var[1], state.count[1]) == (7, 8, 0)


def test_one_compilation_for_all_batches():
    traced = []

    def counted(params, state, x):
        traced.append(x.shape)
        return bn.batch_norm(x, params, state, train=True)[1]

    for _ in range(2):
        bn.recalibrate(counted, PARAMS[1][0], STATES["first"], draw((4, 4, 4)))
    assert len(traced) == 2  # for the shapes of what is seen, and to compile


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="there are no batches"):
        bn.recalibrate(forward, PARAMS, STATES, [])
    with pytest.raises(ValueError, match="estimator='all'"):
        bn.recalibrate(forward, PARAMS, STATES, draw((4,)), estimator="all")
