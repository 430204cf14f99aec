"""Batch Renormalization against the paper's Algorithm 1, written down again in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn

CORRECTED = {"r_max": 3.0, "d_max": 5.0}
OFF = {"r_max": 1, "d_max": 0}
same = np.testing.assert_array_equal


def draw(m=6, features=4, seed=0, mean=(0.0, 3.0, -20.0, 1e4), scale=(1.0, 5.0, 0.3, 1.0)):
    random = np.random.default_rng(seed)
    normal = random.standard_normal((m, features))
    return np.float32(mean)[:features] + np.float32(scale)[:features] * normal.astype(np.float32)


def learned(features=4):
    random = np.random.default_rng(7)
    values = random.normal(1, 0.5, (2, features)).astype(np.float32)
    return bn.BatchNormParams(*map(jnp.asarray, values))


def oracle(x, gamma, beta, mu, sigma, g, r_max, d_max, weight, epsilon=1e-5):
    """y, the moving averages, and the gradients: Algorithm 1 and section 3 of Ioffe (2017)."""
    m = len(x)
    mu_b, sigma_b = x.mean(0), np.sqrt(x.var(0) + epsilon)
    r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
    d = np.clip((mu_b - mu) / sigma, -d_max, d_max)
    x_hat = (x - mu_b) / sigma_b * r + d
    grad_x_hat = g * gamma
    grad_sigma = (grad_x_hat * (x - mu_b) * -r / sigma_b**2).sum(0)
    grad_mu = (grad_x_hat * -r / sigma_b).sum(0)
    grad_x = grad_x_hat * r / sigma_b + grad_sigma * (x - mu_b) / (m * sigma_b) + grad_mu / m
    moved = mu + weight * (mu_b - mu), sigma + weight * (sigma_b - sigma)
    return gamma * x_hat + beta, moved, (grad_x, (g * x_hat).sum(0), g.sum(0))


@jax.jit
def step(x, params, state, g, r_max, d_max):
    def loss(x, params):
        y, new = bn.batch_renorm(
            x, params, state, train=True, r_max=r_max, d_max=d_max, average=bn.Ema(0.9)
        )
        return (y * g).sum(), (y, new)

    grads, (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)
    return y, new, grads


def test_several_warm_ups_against_the_paper():
    """From no correction to the paper's limits and back, twice: y, the state, all gradients."""
    params = learned()
    gamma, beta = (np.float64(part) for part in params)
    state = bn.BatchNormState(
        jnp.array([0.5, 0.0, -20.0, 9999.0]), jnp.array([1.0, 4.0, 0.01, 4.0]), jnp.full(4, 3)
    )
    mu, sigma = np.float64(state.mean), np.sqrt(np.float64(state.var) + 1e-5)
    for n in range(16):
        ramp = (n % 8) / 7
        r_max, d_max = 1 + 2 * ramp, 5 * ramp
        x, g = draw(seed=n), np.random.default_rng([n, 1]).standard_normal((6, 4))
        y, state, (grad_x, grad_params) = step(
            x, params, state, np.float32(g), np.float32(r_max), np.float32(d_max)
        )
        # The oracle starts each step where the state is, as it is stored: means in float32.
        true_y, (mu, sigma), true_grads = oracle(
            np.float64(x), gamma, beta, mu, sigma, np.float64(np.float32(g)), r_max, d_max, 0.1
        )
        np.testing.assert_allclose(y, true_y, atol=3e-5)
        np.testing.assert_allclose(state.mean, mu, rtol=2e-7, atol=1e-6)
        np.testing.assert_allclose(np.sqrt(state.var + 1e-5), sigma, rtol=2e-6)
        for found, true in zip((grad_x, *grad_params), true_grads, strict=True):
            np.testing.assert_allclose(found, true, atol=2e-5 * np.abs(true).max())
        mu, sigma = np.float64(state.mean), np.sqrt(np.float64(state.var) + 1e-5)
    assert state.count.tolist() == [19] * 4


@pytest.mark.parametrize("affine", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_without_correction_it_is_batch_norm_bit_for_bit(affine, masked):
    params = bn.BatchNormParams(
        *(part if used else None for part, used in zip(learned(), affine, strict=True))
    )
    state = bn.BatchNormState(jnp.ones(4), jnp.full(4, 3.0), jnp.full(4, 5))
    x, g = draw(), draw(seed=1)
    where = np.arange(6) < 4 if masked else None

    def result(f, **options):
        def loss(x, params):
            y, _ = f(x, params, state, train=True, where=where, **options)
            return (y * g).sum(), y

        grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, params)
        return y, grads[0]

    jax.tree.map(same, result(bn.batch_renorm, **OFF), result(bn.batch_norm))


def test_unclipped_it_is_inference():
    """Where no limit is reached, y is what inference makes of x."""
    state = bn.BatchNormState(jnp.array([0.5, 2.0]), jnp.array([2.0, 9.0]), jnp.array([3, 3]))
    x = draw(features=2)
    y, _ = bn.batch_renorm(x, learned(2), state, train=True, r_max=1e6, d_max=1e6)
    expected, unchanged = bn.batch_renorm(x, learned(2), state, train=False, **CORRECTED)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    same(expected, bn.batch_norm(x, learned(2), state, train=False)[0])
    assert unchanged is state


def test_limits_are_kept_and_do_not_grow_with_the_calls():
    """A clip whose result is thrown away lets the correction grow with each warm-up."""
    params, _ = bn.init(1)
    state = bn.BatchNormState(jnp.array([-100.0]), jnp.array([1e-4]), jnp.array([3]))
    x = np.float32([[-1.0], [1.0]])
    for _ in range(4):
        y, _ = bn.batch_renorm(x, params, state, train=True, **CORRECTED)
        np.testing.assert_allclose(y, [[-3 + 5], [3 + 5]], rtol=1e-4)


def test_a_new_state_corrects_nothing():
    params, state = bn.init(4)
    x = draw()
    y, new = bn.batch_renorm(x, params, state, train=True, **CORRECTED)
    same(y, bn.batch_norm(x, params, state, train=True)[0])
    # The first batch is remembered as it is: DebiasedEma keeps nothing of the initial state.
    np.testing.assert_allclose(new.mean, np.float64(x).mean(0), rtol=1e-6)
    np.testing.assert_allclose(new.var, np.float64(x).var(0), rtol=1e-5)


def test_standard_deviations_are_averaged_and_not_variances():
    params, state = bn.init(1)
    average = bn.CumulativeAverage()
    for spread in (1.0, 3.0):
        x = np.float32([[-spread], [spread]])
        _, state = bn.batch_renorm(x, params, state, train=True, average=average, **CORRECTED)
    np.testing.assert_allclose(state.var, [2.0**2], rtol=1e-5)  # variances would give 5


def test_dead_features():
    """A constant feature has finite y, gradients and statistics, also with ε = 0."""
    x = draw()
    x[:, 1] = 3
    for epsilon in (1e-5, 0.0):
        state = bn.init(4)[1]
        call = partial(bn.batch_renorm, train=True, epsilon=epsilon, **CORRECTED)
        for _ in range(3):
            _, state = call(x, learned(), state)
        grads = jax.grad(lambda x, p, s=state, f=call: (f(x, p, s)[0] ** 2).sum(), argnums=(0, 1))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads(x, learned())))
        assert np.isfinite(state.var).all()
        y, _ = bn.batch_norm(x, learned(), state, train=False, epsilon=epsilon)
        assert np.isfinite(y).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Statistics and corrections are float32; y is rounded once."""
    x = jnp.asarray(draw(features=3), dtype)
    state = bn.BatchNormState(
        jnp.array([0.5, 2.0, -20.0]), jnp.array([2.0, 9.0, 0.1]), jnp.full(3, 2)
    )
    y, new = bn.batch_renorm(x, learned(3), state, train=True, **CORRECTED)
    wide, expected = bn.batch_renorm(
        x.astype(jnp.float32), learned(3), state, train=True, **CORRECTED
    )
    assert y.dtype == dtype
    same(y, wide.astype(dtype))
    jax.tree.map(same, new, expected)


def test_masks_are_removal():
    x = draw(m=9)
    keep = np.array([1, 1, 0, 1, 0, 1, 1, 0, 1], bool)
    spoiled = np.where(keep[:, None], x, np.nan)
    state = bn.BatchNormState(jnp.ones(4), jnp.full(4, 3.0), jnp.full(4, 5))
    y, new = bn.batch_renorm(spoiled, learned(), state, train=True, where=keep, **CORRECTED)
    expected, expected_state = bn.batch_renorm(x[keep], learned(), state, train=True, **CORRECTED)
    np.testing.assert_allclose(y[keep], expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), new, expected_state)


def test_pooled_axes():
    x = draw(m=8)
    state = bn.BatchNormState(jnp.ones(4), jnp.full(4, 3.0), jnp.full(4, 5))
    call = partial(bn.batch_renorm, params=learned(), state=state, train=True, **CORRECTED)
    members = jax.vmap(partial(call, axis_name="n"), axis_name="n", out_axes=(0, None))
    y, new = members(x.reshape(4, 2, 4))
    expected, expected_state = call(x)
    np.testing.assert_allclose(y.reshape(8, 4), expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), new, expected_state)


STATE = bn.BatchNormState(jnp.ones(4), jnp.full(4, 3.0), jnp.full(4, 5))
nearly = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_ghost_groups_are_corrected_alone_and_remembered_together(masked):
    """Groups of 4, 4 and 2 on axis 1: y and gradients are those of each alone; the state is one."""
    x, g, params = draw(m=10), draw(m=10, seed=1), learned()
    where = np.arange(10) != 1 if masked else None

    def loss(x, params, size, where, g):
        options = {"feature_axis": 0, "where": where, "group_size": size} | CORRECTED
        y, new = bn.batch_renorm(x, params, STATE, train=True, **options)
        return (y * g).sum(), (y, new)

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (dx, dparams), (y, new) = run(x.T, params, 4, where, g.T)
    parts = []
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        mask = where if where is None else where[rows]
        parts.append(run(x[rows].T, params, None, mask, g[rows].T))
    nearly(y, np.concatenate([part for _, (part, _) in parts], 1))
    nearly(dx, np.concatenate([part for (part, _), _ in parts], 1))
    for found, *expected in zip(dparams, *(part for (_, part), _ in parts), strict=True):
        nearly(found, sum(map(np.asarray, expected)))
    _, (_, expected_state) = run(x.T, params, None, where, g.T)
    jax.tree.map(nearly, new, expected_state)


def test_ghost_groups_without_correction_are_ghost_batch_norm():
    y, _ = bn.batch_renorm(draw(), learned(), STATE, train=True, group_size=4, **OFF)
    same(y, bn.batch_norm(draw(), learned(), STATE, train=True, group_size=4)[0])


def test_ghost_groups_within_the_members_of_an_axis():
    """A member's groups are its own; the state is that of all members."""
    x = draw(m=8)
    call = partial(bn.batch_renorm, params=learned(), state=STATE, train=True, **CORRECTED)
    member = partial(call, axis_name="n", group_size=2)
    y, new = jax.vmap(member, axis_name="n", out_axes=(0, None))(x.reshape(2, 4, 4))
    nearly(y.reshape(4, 2, 4), jax.vmap(call)(x.reshape(4, 2, 4))[0])
    jax.tree.map(nearly, new, call(x)[1])
    with pytest.raises(ValueError, match="group_size=3 leaves a group of one"):
        call(x[:4], group_size=3)


def test_schedules_of_the_count():
    """Each feature is as far as its own count."""
    x = draw(features=2)
    state = bn.BatchNormState(jnp.full(2, 9.0), jnp.full(2, 0.01), jnp.array([100, 1]))
    call = partial(bn.batch_renorm, x, learned(2), state, train=True)
    y, _ = call(
        r_max=lambda count: jnp.where(count > 50, 3.0, 1.0),
        d_max=lambda count: 0.05 * jnp.float32(count),
    )
    whole, _ = call(r_max=3.0, d_max=5.0)
    barely, _ = call(r_max=1.0, d_max=0.05)
    np.testing.assert_allclose(y[:, 0], whole[:, 0], rtol=1e-6)
    np.testing.assert_allclose(y[:, 1], barely[:, 1], rtol=1e-6)


def test_nothing_bad_enters():
    state = bn.BatchNormState(jnp.ones(4), jnp.full(4, 3.0), jnp.full(4, 5))
    x = draw()
    x[2, 1] = np.nan
    _, new = bn.batch_renorm(x, learned(), state, train=True, **CORRECTED)
    assert new.count.tolist() == [6, 5, 6, 6]
    assert (new.mean[1], new.var[1]) == (1, 3)
    for left in (0, 1):  # one value has no variance: y = β, as in batch norm
        mask = np.arange(6) < left
        y, new = bn.batch_renorm(x, learned(), state, train=True, where=mask, **CORRECTED)
        jax.tree.map(same, new, state)
        same(y[0], learned().bias)


def test_complex_data_is_moved_by_d_max_at_most():
    params, _ = bn.init(1, dtype=jnp.complex64)
    state = bn.BatchNormState(jnp.array([30 + 40j]), jnp.ones(1), jnp.array([3]))
    x = np.complex64([[1], [-1], [1j], [-1j]])
    y, new = bn.batch_renorm(x, params, state, train=True, **CORRECTED)
    np.testing.assert_allclose(y.mean(0), [-3 - 4j], rtol=1e-4)
    assert new.mean.dtype == jnp.complex64


def test_mistakes_are_named():
    x, (params, state) = draw(), bn.init(4)
    with pytest.raises(TypeError, match="r_max"):
        bn.batch_renorm(x, params, state, train=True)  # unclipped is no default
    with pytest.raises(ValueError, match=r"r_max=0\.5 must be at least 1"):
        bn.batch_renorm(x, params, state, train=True, r_max=0.5, d_max=0)
    with pytest.raises(ValueError, match="d_max=-1 must be at least 0"):
        bn.batch_renorm(x, params, state, train=True, r_max=1, d_max=-1)
    with pytest.raises(ValueError, match="more than one value per feature"):
        bn.batch_renorm(x[:1], params, state, train=True, **CORRECTED)
