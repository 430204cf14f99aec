"""Nothing bad enters the state, and what is in it stays as it is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bn_jax as bn
from bn_jax.conform import oracle
from bn_jax.core.state import batches_seen

M, C = 8, 3
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((M, C)).astype(np.float32) * 2 + 5
PARAMS = bn.BatchNormParams(jnp.array([1.5, -0.5, 1.0]), jnp.array([0.25, 2.0, -1.0]))
STATE = bn.BatchNormState(
    jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 1.5, 2.5]), jnp.array([4, 5, 6], jnp.int32)
)
AVERAGES = [bn.Ema(0.9), bn.DebiasedEma(0.9), bn.CumulativeAverage(), bn.Ema(0), bn.Ema(1)]
each_average = pytest.mark.parametrize("average", AVERAGES, ids=repr)
train = jax.jit(
    partial(bn.batch_norm, train=True), static_argnames=("average", "unbiased", "feature_axis")
)


def assert_states_equal(a, b, channels=slice(None)):
    for ours, theirs in zip(a, b, strict=True):
        np.testing.assert_array_equal(ours[channels], theirs[channels])


# Batches with nothing, or nothing good, in them.


@pytest.mark.parametrize("average", [bn.DebiasedEma(0.9), bn.Ema(0)], ids=repr)
@pytest.mark.parametrize(
    ("x", "where"),
    [
        (X[:0], None),
        (X, np.zeros(M, bool)),
        (X, np.zeros(M, np.float32)),
        (np.full_like(X, np.nan), np.zeros(M, bool)),
        (np.full_like(X, np.nan), None),
        (np.full_like(X, np.inf), None),
        (np.full_like(X, -np.inf), np.ones(M, np.float32)),
        (np.where(np.arange(C) < 3, [[np.inf]] * 4 + [[-np.inf]] * 4, X), None),
        (X, np.full(M, np.inf, np.float32)),
        (X * 1e30, None),
    ],
    ids=[
        "empty",
        "masked",
        "no weight",
        "masked NaN",
        "NaN",
        "inf",
        "-inf",
        "±inf",
        "inf weight",
        "overflow",
    ],
)
def test_a_bad_batch_leaves_the_state_as_it_was(x, where, average):
    for unbiased in True, False:
        y, state = train(x, PARAMS, STATE, where=where, average=average, unbiased=unbiased)
        assert_states_equal(state, STATE)
    assert y.shape == x.shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_average
def test_a_bad_channel_waits_while_the_others_advance(bad, average):
    x = X.copy()
    x[3, 1] = bad
    y, state = train(x, PARAMS, STATE, average=average)
    _, good = train(X, PARAMS, STATE, average=average)
    others = np.array([0, 2])
    assert_states_equal(state, STATE, 1)
    assert_states_equal(state, good, others)
    np.testing.assert_array_equal(state.count, [5, 5, 7])
    # The output still shows what happened, where it happened.
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, others]).all()


@pytest.mark.parametrize("run", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("size", [1e20, 1e25, 1e30])
def test_where_squares_overflow_y_is_bias_or_nan(size, run):
    """Never a number that could pass for a result."""
    y = run(lambda x: bn.batch_norm(x, PARAMS, STATE, train=True)[0])(X * np.float32(size))
    assert (np.isnan(y) | (np.asarray(y) == np.asarray(PARAMS.bias))).all()


def test_a_broken_running_variance_is_seen():
    """It does not pass for a channel without spread, whose y is β."""
    broken = STATE._replace(var=STATE.var.at[1].set(np.nan))
    y, _ = bn.batch_norm(X, PARAMS, broken, train=False)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()


def test_counts_are_per_feature_and_so_is_the_weight_of_the_past():
    """A channel that skipped its first batches is exact after its own first one."""
    _, state = bn.init(C)
    bad = X.copy()
    bad[:, 1] = np.nan
    for x in bad, bad, X:
        _, state = train(x, PARAMS, state)
    np.testing.assert_array_equal(state.count, [3, 1, 3])
    np.testing.assert_allclose(state.mean[1], X[:, 1].mean(), rtol=1e-6)
    np.testing.assert_allclose(state.var[1], X[:, 1].var(ddof=1), rtol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
def test_one_value_left_by_the_mask(unbiased):
    """It has a mean, and a biased variance of zero, but no unbiased variance."""
    where = np.arange(M) == 2
    y, state = train(X, PARAMS, STATE, where=where, unbiased=unbiased, average=bn.Ema(0.5))
    np.testing.assert_array_equal(y[2], PARAMS.bias)
    if unbiased:
        assert_states_equal(state, STATE)
    else:
        np.testing.assert_allclose(state.mean, (STATE.mean + X[2]) / 2, rtol=1e-6)
        np.testing.assert_allclose(state.var, STATE.var / 2, rtol=1e-6)
        np.testing.assert_array_equal(state.count, STATE.count + 1)


def test_an_average_that_is_not_a_number_does_not_enter():
    assert_states_equal(train(X, PARAMS, STATE, average=lambda count: jnp.nan)[1], STATE)


@pytest.mark.parametrize("weight", [-1, 1.5])
def test_an_average_outside_of_0_and_1_does_not_enter(weight):
    """It raises where it is known when tracing, and leaves the state alone where it is not."""
    with pytest.raises(ValueError, match=rf"returned {weight}.* \[0, 1\].* weight of the past"):
        train(X, PARAMS, STATE, average=lambda count: weight)
    average = lambda count: weight + 0.0 * count.astype(jnp.float32)  # noqa: E731
    assert_states_equal(train(X, PARAMS, STATE, average=average)[1], STATE)
    with pytest.raises(ValueError, match=rf"returned \[?{weight}"):
        bn.batch_norm(X, PARAMS, STATE, train=True, average=average)


def test_a_negative_running_variance_is_seen():
    """Also within epsilon, which is not there to hide it."""
    broken = STATE._replace(var=jnp.array([1.0, -1.0, -1e-6]))
    y, _ = bn.batch_norm(X, PARAMS, broken, train=False)
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to([False, True, True], (M, C)))
    assert np.isnan(bn.as_affine(PARAMS, broken)[0]).tolist() == [False, True, True]


# Padding.


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_padding_may_hold_anything_forward_and_backward(padding, dtype):
    kept = np.arange(M) < 5
    x, where = np.where(kept[:, None], X, np.float32(padding)), kept.astype(dtype)
    dy = RANDOM.standard_normal((M, C)).astype(np.float32)

    def outcome(x, params, where, dy):
        run = lambda x, params: bn.batch_norm(x, params, STATE, train=True, where=where)  # noqa: E731
        y, pullback, state = jax.vjp(run, x, params, has_aux=True)
        return y, state, *pullback(dy)

    y, state, dx, dparams = jax.jit(outcome)(x, PARAMS, where, np.where(kept[:, None], dy, 0))
    removed = jax.jit(outcome)(x[:5], PARAMS, None, dy[:5])
    for a, b in zip(*map(jax.tree.leaves, ((y[:5], state, dx[:5], dparams), removed)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(dx[5:], 0)
    if not np.isfinite(padding):
        np.testing.assert_array_equal(y[5:], np.broadcast_to(PARAMS.bias, (3, C)))
        # A gradient that arrives at padding reaches the bias, and nothing else.
        loud = jax.jit(outcome)(x, PARAMS, where, dy)
        np.testing.assert_array_equal(loud[2][5:], 0)
        np.testing.assert_allclose(loud[2], dx, rtol=0, atol=1e-6)
        np.testing.assert_allclose(loud[3].scale, dparams.scale, rtol=1e-6)
        np.testing.assert_allclose(loud[3].bias, dy.sum(0), rtol=1e-5)


def test_excluded_values_that_are_finite_get_their_output():
    where = np.arange(M) < 5
    y, _ = train(X, PARAMS, STATE, where=where)
    truth = oracle.forward(X, PARAMS.scale, PARAMS.bias, weights=where)
    np.testing.assert_allclose(y, truth.y, rtol=0, atol=1e-5)


# Pooling.


def pooled(x, where, axis_name="members"):
    """By members of an axis."""
    member = lambda x, where: bn.batch_norm(  # noqa: E731
        x, PARAMS, STATE, train=True, where=where, axis_name=axis_name
    )
    return jax.jit(jax.vmap(member, out_axes=(0, None), axis_name=axis_name))(x, where)


@pytest.mark.parametrize("kept", [(4, 4), (8, 0), (7, 1), (0, 8), (2, 3)], ids=str)
def test_uneven_and_empty_members_pooled_are_the_whole(kept):
    """Where a mean of the members' means would be wrong, and with an empty member NaN."""
    where = np.stack([np.arange(M) < n for n in kept])
    x = np.stack([X, X[::-1] * 3 - 40])
    y, state = pooled(np.where(where[..., None], x, np.nan), where)
    expected, whole = train(x[where], PARAMS, STATE)
    np.testing.assert_allclose(y[where], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(state.mean, whole.mean, rtol=0, atol=np.spacing(np.float32(40)))
    np.testing.assert_allclose(state.var, whole.var, rtol=2e-6)
    np.testing.assert_array_equal(state.count, whole.count)


def test_nothing_pooled_with_nothing_leaves_the_state():
    y, state = pooled(np.full((2, M, C), np.nan, np.float32), np.zeros((2, M), bool))
    assert_states_equal(state, STATE)
    np.testing.assert_array_equal(y, np.broadcast_to(PARAMS.bias, (2, M, C)))


def test_one_bad_member_spoils_its_channel_for_all_and_no_other():
    x = np.stack([X, X + 1])
    x[1, 0, 2] = np.nan
    y, state = pooled(x, np.ones((2, M), bool))
    assert_states_equal(state, STATE, 2)
    np.testing.assert_array_equal(state.count, STATE.count + np.array([1, 1, 0]))
    assert np.isnan(y[..., 2]).all()
    assert np.isfinite(y[..., :2]).all()


def test_one_value_per_member_is_enough_when_pooled():
    x = X[:, None]
    member = partial(bn.batch_norm, train=True, axis_name="i")
    y, _ = jax.vmap(member, (0, None, None), (0, None), axis_name="i")(x, PARAMS, STATE)
    np.testing.assert_allclose(y[:, 0], train(X, PARAMS, STATE)[0], rtol=0, atol=1e-5)


# What is kept as it is.


def test_evaluation_returns_the_very_same_state():
    assert bn.batch_norm(X, PARAMS, STATE, train=False)[1] is STATE
    assert bn.batch_norm(X[:0], PARAMS, STATE, train=False)[0].shape == (0, C)
    assert bn.batch_norm(X[:1], PARAMS, STATE, train=False)[0].shape == (1, C)


def test_evaluation_does_not_look_at_where_or_the_axis():
    y, _ = bn.batch_norm(X, PARAMS, STATE, train=False)
    masked, _ = bn.batch_norm(X, PARAMS, STATE, train=False, where=np.arange(M) < 2)
    unbound, _ = bn.batch_norm(X, PARAMS, STATE, train=False, axis_name="nowhere")
    np.testing.assert_array_equal(masked, y)
    np.testing.assert_array_equal(unbound, y)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_what_is_learned_is_float32_at_least(dtype):
    """Half precision stalls: an average of decay 0.99 stops where steps are below half an ulp."""
    state = STATE._replace(mean=STATE.mean.astype(dtype), var=STATE.var.astype(dtype))
    for x in X, X.astype(jnp.bfloat16):
        y, new = train(x, PARAMS, state)
        assert y.dtype == x.dtype
        assert [part.dtype for part in new] == [jnp.float32, jnp.float32, jnp.int32]
    params, fresh = bn.init(C, dtype=dtype)
    assert params.scale.dtype == dtype
    assert fresh.mean.dtype == fresh.var.dtype == jnp.float32
    large = train(X.astype(dtype) * 300, params, fresh)[1]  # a variance beyond float16
    np.testing.assert_allclose(
        large.var, (X.astype(dtype) * 300).astype(float).var(0, ddof=1), rtol=1e-2
    )
    np.testing.assert_array_equal(large.count, 1)


def test_a_half_precision_state_learns(steps=1500):
    state = bn.BatchNormState(*jnp.array([[0], [1]], jnp.bfloat16), jnp.zeros(1, jnp.int32))
    moments = bn.Moments(jnp.full(1, 5.0), jnp.full(1, 4.0), jnp.full(1, 8.0))
    state = bn.advance(state, moments, bn.Ema(0.99))  # from here on, a carry
    step = lambda _, state: bn.advance(state, moments, bn.Ema(0.99))  # noqa: E731
    state = jax.lax.fori_loop(1, steps, step, state)
    np.testing.assert_allclose(state.mean, 5, rtol=1e-5)


# What somebody has loaded has been seen.


@pytest.mark.parametrize("average", [bn.DebiasedEma(0.99), bn.CumulativeAverage()], ids=repr)
def test_loaded_statistics_without_a_count_are_not_lost(average):
    loaded = STATE._replace(count=jnp.zeros(C, jnp.int32))
    counted = STATE._replace(count=jnp.full(C, 1000))
    _, new = train(X, PARAMS, loaded, average=average)
    assert_states_equal(new, train(X, PARAMS, counted, average=average)[1])
    np.testing.assert_array_less(np.abs(new.mean - STATE.mean), 0.011 * np.abs(X.mean(0)))
    assert_states_equal(train(X * jnp.nan, PARAMS, loaded)[1], loaded)
    pooled = bn.pool_states(jax.tree.map(lambda part: part[None], loaded))
    assert_states_equal(pooled, counted)


def test_a_feature_is_loaded_where_mean_or_variance_tell():
    mean, var = jnp.array([0.0, 2.0, 0.0, 0.0]), jnp.array([1.0, 1.0, 3.0, 0.0])
    seen = batches_seen(bn.BatchNormState(mean, var, jnp.zeros(4, jnp.int32)))
    np.testing.assert_array_equal(seen, [0, 1000, 1000, 0])
    np.testing.assert_array_equal(batches_seen(STATE), STATE.count)


def test_a_double_precision_state_keeps_its_digits_with_single_precision_data(x64):
    fine = 1 + 1e-12
    state = bn.BatchNormState(*(jnp.full(C, fine) for _ in range(2)), jnp.ones(C, jnp.int32))
    _, new = train(X, PARAMS, state, average=bn.Ema(1.0))
    assert new.mean.dtype == jnp.float64
    np.testing.assert_array_equal(new.mean, fine)
    np.testing.assert_array_equal(new.var, fine)


def test_a_state_of_numpy_arrays_is_as_good():
    """As a checkpoint may bring them."""
    params, state = jax.tree.map(np.asarray, (PARAMS, STATE))
    for flag in True, False:
        ours = bn.batch_norm(X, params, state, train=flag)
        theirs = bn.batch_norm(X, PARAMS, STATE, train=flag)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("axes", [(3,), (0, 1, 2, 4, 5, 6)], ids=str)
def test_arrays_of_rank_seven(axes, shape=(3, 1, 2, 2, 8, 8, 8)):
    """On which jaxlib 0.10.2 and 0.11 can crash: https://github.com/jax-ml/jax/issues/40412."""
    x = RANDOM.standard_normal(shape).astype(np.float32)
    where = RANDOM.random(shape) < 0.9 if axes == (3,) else None
    params, state = bn.init(tuple(shape[a] for a in axes))

    @jax.jit
    def step(x, params):
        run = lambda x, params: bn.batch_norm(  # noqa: E731
            x, params, state, train=True, feature_axis=axes, where=where
        )
        y, pullback, new = jax.vjp(run, x, params, has_aux=True)
        evaluated, _ = bn.batch_norm(x, params, state, train=False, feature_axis=axes)
        moments = bn.measure(x, feature_axis=axes, where=where)
        return y, new, pullback(y), evaluated, moments

    y, new, (dx, dparams), evaluated, moments = step(x, params)
    truth = oracle.forward(x, axis=axes, weights=where)
    np.testing.assert_allclose(y, truth.y, rtol=0, atol=5e-6)
    np.testing.assert_allclose(evaluated, x, rtol=1e-5)
    assert new.mean.shape == state.mean.shape
    np.testing.assert_allclose(new.mean, truth.mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(moments.var, truth.var, rtol=1e-6)
    gradients = oracle.backward(x, truth.y, axis=axes, weights=where)
    for ours, theirs in zip((dx, *dparams), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(truth.y).sum())


# Any function of the count is an average.


def test_a_custom_average_sees_the_count_of_each_feature():
    _, state = train(X, PARAMS, STATE, average=lambda count: 1 / (1 + count))
    kept = 1 / (1 + np.array([4.0, 5, 6]))
    np.testing.assert_allclose(state.mean, kept * STATE.mean + (1 - kept) * X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        state.var, kept * STATE.var + (1 - kept) * X.var(0, ddof=1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("schedule", "kept"),
    [
        (optax.linear_schedule(0.0, 1.0, 10), [0.4, 0.5, 0.6]),
        (optax.piecewise_constant_schedule(0.9, {5: 0.5}), [0.9, 0.45, 0.45]),
        (
            optax.join_schedules([optax.constant_schedule(0.2), optax.constant_schedule(0.8)], [5]),
            [0.2, 0.8, 0.8],
        ),
    ],
    ids=["linear", "piecewise", "join"],
)
def test_an_optax_schedule_is_an_average(lenient, schedule, kept):
    _, state = train(X, PARAMS, STATE, average=schedule)
    kept = np.array(kept)
    np.testing.assert_allclose(state.mean, kept * STATE.mean + (1 - kept) * X.mean(0), rtol=1e-6)


def test_a_state_per_domain_is_an_index_of_a_leading_axis():
    """One set of running statistics for each of several data sets, chosen by a traced index."""
    states = jax.tree.map(lambda s: jnp.stack([s, s + jnp.ones_like(s)]), STATE)

    @jax.jit
    def step(domain):
        chosen = jax.tree.map(lambda s: s[domain], states)
        _, new = bn.batch_norm(X, PARAMS, chosen, train=True)
        return jax.tree.map(lambda s, n: s.at[domain].set(n), states, new)

    new = step(1)
    assert_states_equal(jax.tree.map(lambda s: s[0], new), STATE)
    np.testing.assert_array_equal(new.count[1], STATE.count + 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["mean", "var"])
def test_either_bad_moment_keeps_a_feature_as_it_was(part, bad):
    """Given to advance as such; of measured data, a bad mean comes with a bad variance."""
    _, state = bn.init(2)
    moments = bn.Moments(jnp.ones(2), jnp.full(2, 3.0), jnp.full(2, 5.0))
    wrong = getattr(moments, part).at[0].set(bad)
    new = bn.advance(state, moments._replace(**{part: wrong}), bn.Ema(0.5))
    assert [float(a[0]) for a in new] == [float(a[0]) for a in state]
    assert [float(a[1]) for a in new] == [0.5, 0.5 + 0.5 * 3 * 5 / 4, 1]
