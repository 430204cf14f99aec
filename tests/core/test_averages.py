"""The moving averages, against their explicit weighted sums."""

import copy
import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn

STRATEGIES = [bn.Ema(0.9), bn.DebiasedEma(0.9), bn.CumulativeAverage()]
STEPS, M, C = 7, 5, 3


def batches(steps=STEPS):
    return np.random.default_rng(0).standard_normal((steps, M, C)) * 3 + 1


def remember(average, xs, unbiased=True):
    """The state after all batches."""
    _, state = bn.init(C, dtype=jnp.float64)
    for x in xs:
        state = bn.advance(state, bn.measure(x), average, unbiased=unbiased)
    return state


def explicit(weights, start, xs):
    """Running mean and (unbiased) variance as one weighted sum over the batches and the start."""
    means, variances = xs.mean(1), xs.var(1, ddof=1)
    mix = lambda parts, first: np.tensordot(weights, parts, 1) + start * first  # noqa: E731
    return mix(means, 0.0), mix(variances, 1.0)


def assert_remembers(state, weights, start, xs):
    mean, var = explicit(np.asarray(weights), start, xs)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(state.var, var, rtol=1e-12)
    np.testing.assert_array_equal(state.count, len(xs))


@pytest.mark.parametrize("decay", [0, 0.5, 0.99, 1])
@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_ema_weighs_the_past_by_powers_of_decay_and_never_forgets_the_start(x64, decay, steps):
    xs = batches(steps)
    weights = [(1 - decay) * decay ** (steps - 1 - t) for t in range(steps)]
    assert_remembers(remember(bn.Ema(decay), xs), weights, decay**steps, xs)


@pytest.mark.parametrize("decay", [0, 0.5, 0.99, 0.999999, 1])
@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_debiased_ema_divides_by_the_sum_of_the_weights(x64, decay, steps):
    xs = batches(steps)
    weights = np.array([decay ** (steps - 1 - t) for t in range(steps)], float)
    assert_remembers(remember(bn.DebiasedEma(decay), xs), weights / weights.sum(), 0, xs)


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_cumulative_average_weighs_all_alike(x64, steps):
    xs = batches(steps)
    assert_remembers(remember(bn.CumulativeAverage(), xs), np.full(steps, 1 / steps), 0, xs)


@pytest.mark.parametrize("average", [bn.DebiasedEma(0.99), bn.CumulativeAverage()])
def test_after_one_step_the_state_is_the_batch(average):
    x = batches()[0].astype(np.float32)
    moments = bn.measure(x)
    state = bn.advance(bn.init(C)[1], moments, average, unbiased=False)
    np.testing.assert_array_equal(state.mean, moments.mean)
    np.testing.assert_array_equal(state.var, moments.var)


def test_the_paper_remembers_the_unbiased_variance(x64):
    x = batches()[0]
    unbiased, biased = (remember(bn.Ema(0.0), [x], unbiased=flag) for flag in (True, False))
    np.testing.assert_allclose(unbiased.var, x.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(biased.var, x.var(0), rtol=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.9999, 0.999999])
@pytest.mark.parametrize("count", [0, 1, 2, 10, 1000, 10**6, 2**31 - 2])
def test_debiased_weight_is_accurate_in_float32_at_any_count(decay, count):
    """1 - decayᵗ as such would have an absolute error of u, relative 1/(1 - decay) times that."""
    rate = math.log(decay)
    truth = decay * math.expm1(rate * count) / math.expm1(rate * (count + 1))
    np.testing.assert_allclose(bn.DebiasedEma(decay)(jnp.int32(count)), truth, rtol=1e-6)


@pytest.mark.parametrize("average", STRATEGIES, ids=repr)
def test_weights_are_weights_and_count_up_to_any_number(average):
    kept = jax.vmap(average)(jnp.array([0, 1, 100, 2**24, 2**31 - 2]))
    assert ((np.asarray(kept) >= 0) & (np.asarray(kept) <= 1)).all()


@pytest.mark.parametrize("average", STRATEGIES, ids=repr)
def test_strategies_are_values(average):
    for twin in (pickle.loads(pickle.dumps(average)), copy.deepcopy(average)):
        assert twin == average
        assert hash(twin) == hash(average)
        assert twin(3) == average(3)
    assert repr(average) == f"{type(average).__name__}({'decay=0.9' if fields(average) else ''})"
    with pytest.raises(dataclasses.FrozenInstanceError):
        average.decay = 0.5


def fields(average):
    return dataclasses.fields(average)


def test_different_strategies_differ():
    assert len({*STRATEGIES, bn.Ema(0.8), bn.DebiasedEma(0.8)}) == 5
    assert bn.Ema(1) == bn.Ema(1.0)
