"""The moving averages, against their explicit weighted sums."""

import copy
import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


@pytest.mark.parametrize("average", [bn.Ema, bn.DebiasedEma])
def test_a_decay_that_is_an_array_is_a_number(average):
    """Which hashes, so that it may be a static argument."""
    for half in np.float32(0.5), np.array(0.5), jnp.float32(0.5):
        assert average(half) == average(0.5)
        assert hash(average(half)) == hash(average(0.5))
        assert repr(average(half)) == f"{average.__name__}(decay=0.5)"
    with pytest.raises(ValueError, match=r"decay has shape \(2,\).*jax.vmap"):
        average(np.array([0.5, 0.9]))
    with pytest.raises(ValueError, match="outside of"):
        average(jnp.float32(1.5))


@pytest.mark.parametrize("average", [bn.Ema, bn.DebiasedEma])
def test_a_sweep_of_decays_under_vmap(average):
    """A traced decay is as good as a Python number, 0 and 1 included."""
    xs = batches().astype(np.float32)

    def train(decay):
        params, state = bn.init(C)
        for x in xs:
            _, state = bn.batch_norm(x, params, state, train=True, average=average(decay))
        return state

    decays = np.array([0, 0.5, 0.99, 0.9999, 1], np.float32)
    swept = jax.jit(jax.vmap(train))(decays)
    for n, decay in enumerate(decays):
        one = train(float(decay))
        jax.tree.map(
            lambda a, b, n=n: np.testing.assert_allclose(a[n], b, rtol=2e-6, atol=1e-7), swept, one
        )


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_a_small_step_has_all_its_digits(steps, decay=0.9999):
    """1 - 0.9999 of float32's 0.9999 is off by 1.7e-4; each step rounds the mean by 2⁻²⁴ of it."""
    moments = bn.Moments(jnp.full(1, 5.0), jnp.full(1, 4.0), jnp.full(1, 8.0))
    step = lambda _, state: bn.advance(state, moments, bn.Ema(decay))  # noqa: E731
    state = jax.lax.fori_loop(0, steps, step, bn.init(1)[1])
    truth = -5 * math.expm1(steps * math.log(decay))
    np.testing.assert_allclose(state.mean, truth, rtol=(steps + 2) * 2.0**-24)


@pytest.mark.parametrize(
    ("average", "new"),
    [
        (bn.Ema(0.9999), lambda t: 1 - 0.9999),
        (bn.DebiasedEma(0.9999), lambda t: 1e-4 / -np.expm1((t + 1) * math.log(0.9999))),
        (bn.CumulativeAverage(), lambda t: 1 / (t + 1)),
        (lambda count: 0.9999, lambda t: 1 - 0.9999),
    ],
    ids=["Ema", "DebiasedEma", "CumulativeAverage", "function"],
)
def test_the_new_batch_has_its_own_weight(average, new):
    """Not 1 minus a rounded one, which after 10⁵ batches has no more than two digits."""
    counts = 10 ** np.arange(6)
    state = bn.BatchNormState(jnp.zeros(6), jnp.ones(6), jnp.asarray(counts))
    ones = jnp.ones(6)
    state = bn.advance(state, bn.Moments(ones, ones, 8 * ones), average)
    np.testing.assert_allclose(state.mean, new(counts.astype(float)) * ones, rtol=1e-6)


# Averages of whole states, as of weights (Polyak): the count is an integer among floats.


def test_an_average_of_states_as_a_carry(decay=0.9):
    """The recipe: average what is a float, and take the rest as it is."""
    xs = jnp.asarray(batches(), jnp.float32)

    def blend(old, new):
        return decay * old + (1 - decay) * new if jnp.issubdtype(new.dtype, jnp.inexact) else new

    def step(carry, x):
        params, state, averaged = carry
        _, state = bn.batch_norm(x, params, state, train=True)
        return (params, state, jax.tree.map(blend, averaged, state)), state

    params, state = bn.init(C)
    (_, last, averaged), states = jax.lax.scan(step, (params, state, state), xs)
    weights = [(1 - decay) * decay ** (STEPS - 1 - t) for t in range(STEPS)]
    np.testing.assert_allclose(averaged.mean, np.tensordot(weights, states.mean, 1), rtol=1e-5)
    np.testing.assert_array_equal(averaged.count, last.count)
    bn.batch_norm(xs[0], params, averaged, train=True)


def test_a_float_count_is_averaged_like_the_rest(lenient):
    """As by optax, which averages all leaves alike: give the state a count of floats."""
    xs = jnp.asarray(batches(), jnp.float32)
    params, state = bn.init(C)
    state = state._replace(count=state.count.astype(jnp.float32))
    ema = optax.ema(0.9)

    def step(carry, x):
        state, past = carry
        _, state = bn.batch_norm(x, params, state, train=True)
        averaged, past = ema.update(state, past)
        return (state, past), averaged

    (last, _), averaged = jax.lax.scan(step, (state, ema.init(state)), xs)
    assert averaged.count.dtype == jnp.float32
    np.testing.assert_array_equal(last.count, STEPS)
    exact = bn.init(C)[1]
    for x in xs:
        exact = bn.advance(exact, bn.measure(x), bn.DebiasedEma(0.99))
    np.testing.assert_allclose(last.mean, exact.mean, rtol=1e-5)


def test_different_strategies_differ():
    assert len({*STRATEGIES, bn.Ema(0.8), bn.DebiasedEma(0.8)}) == 5
    assert bn.Ema(1) == bn.Ema(1.0)
