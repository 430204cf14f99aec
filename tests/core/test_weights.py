"""What weights mean: a mask and integers count values, floats are importances.

As numpy.cov tells fweights from aweights. y is the same for both; they differ in how many values
there are to estimate the remembered, unbiased variance from.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn

M, C = 8, 3
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((M, C)).astype(np.float32) * 2 + 5
PARAMS = bn.BatchNormParams(jnp.array([1.5, -0.5, 1.0]), jnp.array([0.25, 2.0, -1.0]))
_, STATE = bn.init(C)
WEIGHTS = RANDOM.uniform(0.1, 3, M).astype(np.float32)
train = jax.jit(
    partial(bn.batch_norm, train=True), static_argnames=("average", "unbiased", "group_size")
)


def remembered(where, **options):
    return train(X, PARAMS, STATE, where=where, average=bn.Ema(0), **options)[1]


def close(ours, theirs, rtol=2e-6):
    np.testing.assert_allclose(ours, theirs, rtol=rtol)


@pytest.mark.parametrize("scale", [1e-15, 1 / WEIGHTS.sum(), 1.0, 1e15])
def test_importances_have_no_scale(scale):
    """Also not where they sum to 1, as a softmax, or to less."""
    truth = np.stack([np.cov(x, aweights=WEIGHTS) for x in X.T.astype(float)])
    state = remembered(WEIGHTS * np.float32(scale))
    close(state.var, truth)
    close(state.mean, np.average(X, 0, WEIGHTS))
    np.testing.assert_array_equal(state.count, 1)
    biased = np.stack([np.cov(x, aweights=WEIGHTS, ddof=0) for x in X.T.astype(float)])
    close(remembered(WEIGHTS * np.float32(scale), unbiased=False).var, biased)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_integers_are_copies(dtype):
    copies = np.array([0, 1, 2, 3, 1, 1, 4, 0], dtype)
    truth = np.stack([np.cov(x, fweights=copies) for x in X.T.astype(float)])
    for where in copies, copies.tolist(), jnp.asarray(copies):
        state = bn.batch_norm(X, PARAMS, STATE, train=True, where=where, average=bn.Ema(0))[1]
        close(state.var, truth)


def test_the_variance_of_importances_is_estimated_without_bias():
    """The mean of many estimates, of normal values of variance 4, is within four errors of it."""
    x = np.random.default_rng(1).standard_normal((M, 4000)).astype(np.float32) * 2
    where = np.exp(-np.arange(M, dtype=np.float32))
    _, state = bn.init(4000)
    state = bn.advance(state, bn.measure(x, where=where / where.sum()), bn.Ema(0))
    var = np.asarray(state.var, float)
    assert abs(var.mean() - 4) < 4 * var.std() / np.sqrt(var.size)
    biased = bn.measure(x, where=where).var.mean()
    assert biased < 2.5  # so the test can fail: n is 2.16


def test_shares_are_as_good_in_groups_and_over_members():
    whole = remembered(WEIGHTS)
    close(remembered(WEIGHTS, group_size=3).var, whole.var)
    member = partial(bn.batch_norm, train=True, average=bn.Ema(0), axis_name="i")
    run = jax.vmap(
        lambda x, where: member(x, PARAMS, STATE, where=where)[1], axis_name="i", out_axes=None
    )
    state = run(X.reshape(2, 4, C), WEIGHTS.reshape(2, 4))
    close(state.var, whole.var)


# One value, or none.


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_a_mask_that_leaves_one_value_or_none_gives_bias(kept, dtype):
    """Not the other rows times 1/√ε, some hundreds; and a gradient that is finite."""
    where = (np.arange(M) < kept).astype(dtype)
    each = np.stack([where, np.ones(M, dtype)] + [where] * (C - 2), 1)  # by features

    def run(x, params):
        y, state = bn.batch_norm(x, params, STATE, train=True, where=each)
        return (y * jnp.arange(M, dtype=y.dtype)[:, None]).sum(), (y, state)

    (dx, dparams), (y, state) = jax.grad(run, (0, 1), has_aux=True)(jnp.asarray(X), PARAMS)
    alone = np.array([0, 2])
    np.testing.assert_array_equal(y[:, alone], np.broadcast_to(PARAMS.bias[alone], (M, 2)))
    np.testing.assert_array_equal(dx[:, alone], 0)
    np.testing.assert_array_equal(dparams.scale[alone], 0)
    np.testing.assert_array_equal(dparams.bias[alone], np.arange(M).sum())
    whole, _ = bn.batch_norm(X, PARAMS, STATE, train=True)
    np.testing.assert_allclose(y[:, 1], whole[:, 1], atol=1e-5)
    np.testing.assert_array_equal(state.count, [0, 1, 0])
    np.testing.assert_array_equal(state.var[alone], 1)


def test_a_group_that_the_mask_leaves_one_value_gives_bias():
    where = np.array([1, 1, 1, 1, 0, 1, 0, 0], bool)
    y, _ = bn.batch_norm(X, PARAMS, STATE, train=True, where=where, group_size=4)
    np.testing.assert_array_equal(y[4:], np.broadcast_to(PARAMS.bias, (4, C)))
    assert np.abs(np.asarray(y)[:4] - np.asarray(PARAMS.bias)).min() > 1e-3


@pytest.mark.parametrize("rest", [0.0, 1e-30, 1e-9, 1e-6])
def test_one_weight_that_outweighs_all_others_is_one_value(rest):
    """No variance is known; the state stays as it is, instead of taking over what rounding left."""
    where = np.where(np.arange(M) == 2, 1, rest).astype(np.float32)
    y, state = bn.batch_norm(X, PARAMS, STATE, train=True, where=where)
    np.testing.assert_array_equal(y, np.broadcast_to(PARAMS.bias, (M, C)))
    jax.tree.map(np.testing.assert_array_equal, state, STATE)


def test_a_small_effective_count_is_corrected_to_a_percent():
    where = np.where(np.arange(M) == 2, 1, 2e-5).astype(np.float32)
    truth = np.stack([np.cov(x, aweights=where.astype(float)) for x in X.T.astype(float)])
    np.testing.assert_allclose(remembered(where).var, truth, rtol=1e-2)


# Padding at inference.


@pytest.mark.parametrize("padding", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [np.float32, jnp.bfloat16])
def test_padding_may_hold_anything_at_inference(padding, kind):
    """Op by op, so that no NaN is made on the way either."""
    kept = np.arange(M) < 5
    x = jnp.asarray(np.where(kept[:, None], X, padding)).astype(kind)
    state = bn.BatchNormState(jnp.full(C, 4.0), jnp.full(C, 2.0), jnp.ones(C, jnp.int32))

    def loss(x, params, mean, var, where):
        y = bn.normalize(x, mean, var, params, where=where)
        weights = jnp.where(kept, 1.0, 0.0)[:, None]
        return (jnp.tanh(y.astype(jnp.float32)) * weights).sum(), y

    for where in kept, kept.astype(np.float32):
        with jax.debug_nans(True), jax.debug_infs(True):
            run = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
            gradients, y = run(x, PARAMS, state.mean, state.var, where)
            same, _ = bn.batch_norm(x, PARAMS, state, train=False, where=where)
        np.testing.assert_array_equal(y, same)
        np.testing.assert_array_equal(y[5:], np.broadcast_to(PARAMS.bias.astype(kind), (3, C)))
        np.testing.assert_array_equal(gradients[0][5:], 0)
    expected = jax.grad(
        lambda *args: jnp.tanh(bn.normalize(args[0], *args[2:], args[1]).astype(jnp.float32)).sum(),
        (0, 1, 2, 3),
    )(x[:5], PARAMS, state.mean, state.var)
    found = (gradients[0][:5], *gradients[1:])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
