"""The accuracy bars, for the public default under jit, against float64 on the same inputs.

bn_jax/conform/bars.py lists them and says how errors are measured.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.conform import oracle
from bn_jax.conform.bars import errors, nominal_bars, normal, ulp

pytestmark = pytest.mark.optimized

OFFSETS = [0.0, 1e2, 1e4, 1e5]


@functools.partial(jax.jit, static_argnames="epsilon")
def step(x, dy, where=None, epsilon=1e-5):
    """All that a training step computes; the state is that of this batch alone."""
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    params, state = bn.init(x.shape[-1], dtype=dtype)

    def forward(x, params):
        return bn.batch_norm(
            x,
            params,
            state,
            train=True,
            average=bn.Ema(0.0),
            unbiased=False,
            where=where,
            epsilon=epsilon,
        )

    y, pullback, state = jax.vjp(forward, x, params, has_aux=True)
    return y, state, *pullback(dy)


def assert_bars(x, dy, outcome, offset, where=None, epsilon=1e-5):
    y, state, dx, (dscale, dbias) = outcome
    found = oracle.Outcome(y, dx, dscale, dbias, state.mean, state.var)
    truth = oracle.step(x, dy, epsilon=epsilon, weights=where)
    for quantity, error in errors(found, *truth, dy, offset).items():
        assert error <= nominal_bars(offset)[quantity], quantity


def assert_within(actual, expected, bound):
    """The largest error in units of its bound is at most one."""
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert (error / np.maximum(bound, np.finfo(float).tiny)).max() <= 1


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(
    "shape",
    [(2, 16), (3, 16), (5, 16), (7, 64), (31, 16), (60, 100), (97, 16), (1024, 64), (4093, 16)]
    + [(65536, 1), (200704, 1), (200704, 2), (200704, 8)],
    ids=str,
)
def test_bars(shape, offset):
    x, dy = normal(*shape, offset)
    assert_bars(x, dy, step(x, dy), offset)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", ["mask", "weights", "small weights"])
def test_bars_hold_for_masks_and_weights(kind, offset, shape=(97, 16)):
    x, dy = normal(*shape, offset)
    random = np.random.default_rng(5)
    where = {
        "mask": random.random(shape) < 0.5,
        "weights": random.uniform(0, 3, shape).astype(np.float32),
        "small weights": random.uniform(0, 1e-3, shape).astype(np.float32),
    }[kind]
    assert_bars(x, dy, step(x, dy, where), offset, where)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((8, 3, 9, 5), 1), ((8, 9, 5, 3), -1), ((32, 32, 32, 3), -1), ((32, 3, 32, 32), 1)],
)
def test_bars_hold_for_images(shape, axis, offset):
    """Sums over several axes, which some backends add up one number after the other."""
    random = np.random.default_rng(6)
    x = (offset + random.standard_normal(shape)).astype(np.float32)
    params, state = bn.init(3)
    y, state = jax.jit(
        lambda x: bn.batch_norm(
            x, params, state, train=True, feature_axis=axis, average=bn.Ema(0.0), unbiased=False
        )
    )(x)
    truth = oracle.forward(x, axis=axis)
    np.testing.assert_allclose(y, truth.y, rtol=0, atol=5e-6 if offset <= 1e4 else 1e-5)
    np.testing.assert_allclose(state.var, truth.var, rtol=1e-6 if offset <= 1e4 else 1e-5)


def test_small_images_are_summed_with_care(shape=(22, 2, 6, 6)):
    """One sum over all axes would be one number after the other here, off by 21 u, not 3."""
    measure = jax.jit(lambda x: bn.measure(x, feature_axis=1))
    for seed in range(12):
        x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        np.testing.assert_allclose(measure(x).var, oracle.forward(x, axis=1).var, rtol=8 * oracle.U)


# Pooling keeps the bars: it agrees on an origin first, so that no mean is stored on the way.


@functools.partial(jax.jit, static_argnames="members")
def pooled(x, dy, where, members):
    """The same step, by members of a named axis, who must all remember the same."""
    params, state = bn.init(x.shape[-1])
    split = lambda a: a.reshape(members, -1, *a.shape[1:])  # noqa: E731

    def member(x, where, params):
        return bn.batch_norm(
            x,
            params,
            state,
            train=True,
            average=bn.Ema(0.0),
            unbiased=False,
            where=where,
            axis_name="members",
        )

    def forward(x, params):
        over = jax.vmap(member, (0, 0, None), (0, None), axis_name="members")
        y, state = over(split(x), split(where), params)
        return y.reshape(x.shape), state

    y, pullback, state = jax.vjp(forward, x, params, has_aux=True)
    return y, state, *pullback(dy)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("split", ["even", "uneven", "one empty", "one value against many"])
def test_bars_hold_for_any_split_over_an_axis(split, offset, members=4, size=250):
    x, dy = normal(members * size, 8, offset)
    where = np.ones((members, size), bool)
    if split == "uneven":
        where[0, 100:] = where[1, 3:] = False
    elif split == "one empty":
        where[2] = False
    elif split == "one value against many":
        where[0, 1:] = where[1] = where[2] = False
    where = where.reshape(-1)
    x = np.where(where[:, None], x, np.nan)
    dy = np.where(where[:, None], dy, 0)
    assert_bars(x, dy, pooled(x, dy, where, members), offset, where)


def test_bars_hold_where_one_small_member_is_far_from_the_others(members=4, size=250):
    """A plain mean of the members' means would be an origin 2500 away from the batch's mean."""
    x, dy = normal(members * size, 8)
    where = np.ones((members, size), bool)
    where[0, 1:] = False
    x[:size] += 1e4
    assert_bars(x, dy, pooled(x, dy, where.reshape(-1), members), 0, where.reshape(-1))


# Stress.


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_bars_hold_at_any_scale_without_epsilon(size, offset, shape=(1021, 8)):
    x, dy = normal(*shape, offset)
    x = np.float32(size) * x
    assert_bars(x, dy, step(x, dy, epsilon=0.0), offset, epsilon=0.0)


@pytest.mark.parametrize("row", [0, 500, -1])
def test_bars_hold_with_an_outlier(row, shape=(1021, 8)):
    x, dy = normal(*shape, 3.0)
    x[row] = 1e6
    assert_bars(x, dy, step(x, dy), 0)


def test_bars_hold_with_alternating_signs(shape=(1024, 8)):
    x, dy = normal(*shape)
    x = np.abs(x) + 1e4
    x[::2] *= -1
    assert_bars(x, dy, step(x, dy), 0)


def test_subnormals_are_nothing_to_be_afraid_of(shape=(64, 8)):
    x, dy = normal(*shape)
    x = x * np.float32(1e-40)
    y, state, dx, dparams = step(x, dy)
    np.testing.assert_allclose(y, 0, atol=1e-30)
    for part in jax.tree.leaves((state, dx, dparams)):
        assert np.isfinite(part).all()
    np.testing.assert_allclose(dx, (dy - dy.mean(0)) / np.sqrt(1e-5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [4, 64, 128])
def test_integers_with_an_integer_mean_are_exact(m):
    """Sums of integers are exact below 2²⁴, and so are moments that are integers.

    As long as all values make the origin: that of a part of them is no integer.
    """
    random = np.random.default_rng(m)
    half = random.integers(-30, 30, (m // 2, 8))
    x = np.concatenate([half, -half]) + 1000
    _, state, *_ = step(x.astype(np.float32), np.zeros_like(x, np.float32))
    np.testing.assert_array_equal(state.mean, 1000)
    np.testing.assert_array_equal(state.var, (2 * half**2).sum(0) / np.float64(m))


@pytest.mark.parametrize("magnitude", [1e10, 1e15, 1e18])
def test_large_magnitudes_never_give_a_negative_or_undefined_variance(magnitude, shape=(64, 8)):
    x, dy = normal(*shape)
    x = np.float32(magnitude) * np.clip(x, -1, 1)
    y, state, dx, _ = step(x, dy)
    assert (np.asarray(state.var) >= 0).all()
    np.testing.assert_allclose(state.var, oracle.forward(x).var, rtol=1e-6)
    np.testing.assert_allclose(y, oracle.forward(x).y, rtol=0, atol=5e-6)
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("offset", OFFSETS)
def test_jit_and_eager_agree(offset, shape=(60, 16)):
    x, dy = normal(*shape, offset)
    jitted = step(x, dy)
    with jax.disable_jit():
        eager = step(x, dy)
    for a, b in zip(*map(jax.tree.leaves, (jitted, eager)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


# Other precisions.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_half_precision_is_that_of_input_and_output_only(dtype, offset, shape=(1021, 8)):
    x, dy = (jnp.asarray(part, dtype) for part in normal(*shape, offset))
    y, state, dx, (dscale, dbias) = step(x, dy)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert (state.mean.dtype, state.var.dtype, dscale.dtype) == (jnp.float32,) * 3
    values, dvalues = (np.asarray(part, np.float64) for part in (x, dy))
    truth = oracle.forward(values)
    true_dx, true_dscale, true_dbias = oracle.backward(values, dvalues)
    np.testing.assert_allclose(state.var, truth.var, rtol=1e-6)
    assert_within(state.mean, truth.mean, 2 * ulp(np.maximum(np.abs(truth.mean), 1)))
    assert_within_one_ulp(y, truth.y, 5e-6)
    assert_within_one_ulp(dx, true_dx, 2e-6 * np.abs(true_dx).max())
    assert_within(dscale, true_dscale, 2e-6 * np.abs(dvalues * truth.y).sum(0))
    assert_within(dbias, true_dbias, 2e-6 * np.abs(dvalues).sum(0))


def assert_within_one_ulp(actual, truth, slack):
    """Rounded once: off by half a unit in the last place, plus what was there before rounding."""
    unit = float(jnp.finfo(actual.dtype).eps)
    smallest = float(jnp.finfo(actual.dtype).smallest_subnormal)
    assert_within(actual, truth, 0.5 * unit * np.abs(truth) + slack + smallest)


def test_evaluation_in_half_precision_does_not_round_the_state(dtype=jnp.bfloat16):
    """A state rounded to bfloat16 would be off by 0.2 at a mean of 100."""
    x = jnp.asarray(normal(64, 8, 100.0)[0], dtype)
    params, state = bn.init(8)
    state = state._replace(mean=state.mean + 100.3, var=state.var * 1.003)
    y, _ = bn.batch_norm(x, params, state, train=False)
    truth = (np.asarray(x, np.float64) - np.float32(100.3)) / np.sqrt(np.float32(1.003) + 1e-5)
    assert_within_one_ulp(y, truth, 5e-6)


@pytest.mark.parametrize("offset", OFFSETS)
def test_double_precision_has_all_its_digits(x64, offset, shape=(97, 8)):
    random = np.random.default_rng(8)
    x, dy = random.standard_normal((2, *shape))
    x += offset
    y, _, dx, (dscale, dbias) = step(x, dy)
    truth = oracle.forward(x)
    assert y.dtype == jnp.float64
    # The oracle itself rounds the mean at u·R.
    slack = 1e-12 + 4e-16 * offset
    np.testing.assert_allclose(y, truth.y, rtol=0, atol=slack)
    np.testing.assert_allclose(dx, oracle.backward(x, dy)[0], rtol=0, atol=slack)
    np.testing.assert_allclose(dscale, oracle.backward(x, dy)[1], rtol=0, atol=100 * slack)
    np.testing.assert_allclose(dbias, oracle.backward(x, dy)[2], rtol=0, atol=1e-12)


def test_complex_data_are_as_accurate_as_real(shape=(97, 8)):
    real, imaginary = normal(*shape, 1e3)
    x = (real + 1j * (imaginary - 1e3)).astype(np.complex64)
    params, state = bn.init(8, dtype=jnp.complex64)
    y, state = jax.jit(
        lambda x: bn.batch_norm(x, params, state, train=True, average=bn.Ema(0.0), unbiased=False)
    )(x)
    truth = oracle.forward(x)
    assert (y.dtype, state.mean.dtype, state.var.dtype) == ("complex64", "complex64", "float32")
    np.testing.assert_allclose(state.var, truth.var, rtol=1e-6)
    np.testing.assert_allclose(y, truth.y, rtol=0, atol=5e-6)
