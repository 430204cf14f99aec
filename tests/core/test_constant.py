"""A constant feature normalizes to exactly zero, whatever the constant and however many values.

It must: with ε = 0, or small against u²μ², the rounding errors of a feature without spread would
come out scaled to a standard deviation of one. And its gradient must be finite, though r may be
1/√ε or 0, and r³ is not a number that fits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.conform import oracle

pytestmark = pytest.mark.optimized

C = 16
COUNTS = [2, 3, 5, 7, 13, 25, 61, 97, 251, 509, 1021, 4093, 65537]
SOME_COUNTS = [7, 25, 97, 251, 4093]
BIAS = np.linspace(-3, 3, C, dtype=np.float32)


def constants(seed):
    random = np.random.default_rng(seed)
    size = 10 ** random.uniform(-6, 6, C)
    values = size * random.choice([-1, 1], C)
    values[:4] = 0, 0.1, 1e5 + 1 / 3, -1e4 / 3
    return values.astype(np.float32)


@jax.jit
def step(x, dy, epsilon, where):
    params, state = bn.init(C)

    def forward(x, params):
        return bn.batch_norm(x, params, state, train=True, epsilon=epsilon, where=where)

    y, pullback, state = jax.vjp(forward, x, params._replace(bias=BIAS), has_aux=True)
    return y, state, *pullback(dy)


def mask(m, random):
    where = random.random(m) < 0.7
    where[:2] = True
    return where


WHERE = {
    "plain": lambda m, random: None,
    "mask": mask,
    "weights": lambda m, random: (3 * random.random(m) + 1).astype(np.float32),
}


@pytest.mark.parametrize(
    ("kind", "m"),
    [("plain", m) for m in COUNTS]
    + [(kind, m) for kind in ("mask", "weights") for m in SOME_COUNTS],
)
def test_constants_become_bias_exactly(kind, m):
    random = np.random.default_rng(m)
    value, where = constants(m), WHERE[kind](m, random)
    x = np.broadcast_to(value, (m, C))
    dy = random.standard_normal((m, C)).astype(np.float32)
    for epsilon in 1e-5, 0.0:
        y, state, dx, (dscale, dbias) = step(x, dy, epsilon, where)
        np.testing.assert_array_equal(y, np.broadcast_to(BIAS, (m, C)))
        np.testing.assert_array_equal(state.mean, value)
        np.testing.assert_array_equal(state.var, 0)
        # Σ dy·x̂ = r (Σ dy (x - s) - (μ - s) Σ dy), with an origin s a few ulp from the constant.
        size = 4 * np.spacing(np.abs(value)) * np.abs(dy).sum(0) / np.sqrt(1e-5)
        assert (np.abs(dscale) <= (0 if epsilon == 0 else 8 * oracle.U * size)).all()
        np.testing.assert_allclose(dbias, dy.sum(0), rtol=0, atol=1e-6 * np.abs(dy).sum(0).max())
        if epsilon == 0:
            np.testing.assert_array_equal(dx, 0)
        else:
            counted = np.ones(m) if where is None else np.asarray(where, np.float64)
            flat = dy - counted[:, None] / counted.sum() * dy.sum(0, dtype=np.float64)
            np.testing.assert_allclose(dx, flat / np.sqrt(1e-5), rtol=0, atol=2e-6 * 4 * 317)


@pytest.mark.parametrize("m", [3, 61])
def test_constants_become_bias_exactly_in_eager_mode_too(m):
    params, state = bn.init(C)
    y, state = bn.batch_norm(
        np.broadcast_to(constants(m), (m, C)),
        params._replace(bias=BIAS),
        state,
        train=True,
        epsilon=0.0,
    )
    np.testing.assert_array_equal(y, np.broadcast_to(BIAS, (m, C)))
    np.testing.assert_array_equal(state.var, 0)


@pytest.mark.parametrize("members", [2, 3, 7])
def test_constants_pooled_over_an_axis_become_bias_exactly(members, m=13):
    params, state = bn.init(C)
    value = constants(members)
    y, state = jax.jit(
        jax.vmap(
            lambda x: bn.batch_norm(
                x, params._replace(bias=BIAS), state, train=True, epsilon=0.0, axis_name="i"
            ),
            axis_name="i",
        )
    )(np.broadcast_to(value, (members, m, C)))
    np.testing.assert_array_equal(y, np.broadcast_to(BIAS, (members, m, C)))
    np.testing.assert_array_equal(state.mean, np.broadcast_to(value, (members, C)))
    np.testing.assert_array_equal(state.var, 0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_constants_in_any_precision(dtype, epsilon, m=37):
    dy = jnp.asarray(np.random.default_rng(m).standard_normal((m, C)), dtype)
    for value in 0.1, -1000 / 3, 6e4:
        y, _, dx, _ = step(jnp.full((m, C), value, dtype), dy, epsilon, None)
        np.testing.assert_array_equal(y, np.broadcast_to(BIAS.astype(dtype), (m, C)))
        assert jnp.isfinite(dx).all()


@pytest.mark.parametrize("exponent", [-17, -13, 0, 13, 17])
def test_any_spread_has_a_right_gradient_without_epsilon(exponent, m=9):
    """Nothing on the way may leave float32's range, as r³ does from 1e±13 on."""
    random = np.random.default_rng(7)
    x, dy = random.standard_normal((2, m, 3)).astype(np.float32)
    params, state = bn.init(3)
    run = jax.jit(lambda x: bn.batch_norm(x, params, state, train=True, epsilon=0.0)[0])
    size = np.float32(10.0**exponent)
    y, pullback = jax.vjp(run, x * size)
    np.testing.assert_allclose(y, run(x), rtol=0, atol=5e-6)
    (dx,), (unit,) = pullback(dy), jax.vjp(run, x)[1](dy)
    np.testing.assert_allclose(dx * size, unit, rtol=0, atol=4e-6 * np.abs(dy).max())


def test_a_single_value_among_zeros(m=200):
    """The largest normalized value there is, √(m - 1)."""
    x = np.zeros((m, 1), np.float32)
    x[0] = 7
    y, _ = bn.batch_norm(x, *bn.init(1), train=True, epsilon=0.0)
    np.testing.assert_allclose(y[0], np.sqrt(m - 1), rtol=1e-6)
    np.testing.assert_allclose(y[1:], -1 / np.sqrt(m - 1), rtol=2e-6)


def test_normalizing_by_no_variance_has_finite_derivatives():
    """Of statistics that are given, too: σ² + ε = 0 gives y = β, and no 0·∞ on the way back."""
    x, mean, var = jnp.ones((3, 2)), jnp.array([1.0, 0.0]), jnp.array([0.0, 4.0])
    params = bn.BatchNormParams(jnp.array([2.0, 3.0]), jnp.array([5.0, 7.0]))

    def normalized(x, mean, var, params):
        return bn.normalize(x, mean, var, params, epsilon=0.0)

    y, pullback = jax.vjp(normalized, x, mean, var, params)
    np.testing.assert_allclose(y, np.broadcast_to([5.0, 8.5], (3, 2)))
    for gradient in jax.tree.leaves(pullback(jnp.ones_like(y))):
        assert jnp.isfinite(gradient).all()


def test_a_constant_has_the_third_derivatives_of_the_formula(x64, epsilon=0.5):
    """The variance is 0 to first order only."""
    x, weights = jnp.full(5, 3.0), jnp.array([1.0, -2, 0.5, 3, -1])
    params, state = bn.init(1, dtype=x.dtype)

    def ours(x):
        y = bn.batch_norm(x[:, None], params, state, train=True, epsilon=epsilon)[0]
        return weights @ (y[:, 0] + y[:, 0] ** 3)

    def formula(x):
        y = (x - x.mean()) / jnp.sqrt(jnp.mean((x - x.mean()) ** 2) + epsilon)
        return weights @ (y + y**3)

    third = lambda f: jax.jit(jax.jacfwd(jax.hessian(f)))(x)  # noqa: E731
    assert jnp.abs(third(formula)).max() > 1
    np.testing.assert_allclose(third(ours), third(formula), rtol=1e-12, atol=1e-12)


def test_weighted_constants_of_any_size_become_bias_exactly(m=97, features=8192):
    """One step to the mean leaves some off by units in the last place; the second lands on it."""
    random = np.random.default_rng(0)
    params, _ = bn.init(features)
    value = random.normal(size=features) * 10 ** random.uniform(-3, 3, features)
    x = np.broadcast_to(value.astype(np.float32), (m, features))
    where = random.uniform(0, 3, (m, features)).astype(np.float32)
    train = jax.jit(lambda x, where: bn.standardize(x, params, where=where, epsilon=0.0)[0])
    np.testing.assert_array_equal(train(x, where), np.zeros((m, features)))
