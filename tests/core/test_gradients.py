"""Derivatives, three times: what JAX gives, the paper's equations, and finite differences.

In double precision, where a central difference of step h = 1e-5 is off by h²·f''' + u·f/h ≈ 1e-10
of the size of f, and the equations by 1e-12.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.conform import oracle

pytestmark = pytest.mark.usefixtures("x64")

SHAPE = (5, 4, 3)
RANDOM = np.random.default_rng(0)
X, DY = RANDOM.standard_normal((2, *SHAPE)) * 2 + 0.5
MASK = RANDOM.random(SHAPE[:-1]) < 0.6
WEIGHTS = RANDOM.integers(0, 4, SHAPE).astype(float)
CASES = {
    "plain": {},
    "mask": {"where": MASK},
    "weights": {"where": WEIGHTS},
    "axis 1": {"feature_axis": 1},
    "two axes": {"feature_axis": (0, 2)},
    "one feature": {"feature_axis": (), "where": WEIGHTS},
    "large epsilon": {"epsilon": 3.0},
    "no epsilon": {"epsilon": 0.0, "where": MASK},
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def parts(options):
    """Params and state of a case, and its loss: a random linear function of y."""
    axis = oracle.features(options.get("feature_axis", -1))
    sizes = tuple(SHAPE[a] for a in axis)
    random = np.random.default_rng(1)
    params = bn.BatchNormParams(*map(jnp.asarray, random.standard_normal((2, *sizes))))
    _, state = bn.init(sizes, dtype=jnp.float64)
    return params, state


def normalized(options, state):
    return lambda x, params: bn.batch_norm(x, params, state, train=True, **options)[0]


def reference(options):
    """The options in the oracle's words."""
    return {
        "axis": options.get("feature_axis", -1),
        "weights": options.get("where"),
        "epsilon": options.get("epsilon", 1e-5),
    }


def along(tree, direction):
    """The inner product of two trees."""
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), tree, direction)))


def assert_derivatives(loss, at, h=1e-5):
    """First and second derivatives of a loss along a random direction, in every mode."""
    random = np.random.default_rng(7)
    at = jax.tree.map(jnp.asarray, at)
    direction = jax.tree.map(lambda a: jnp.asarray(random.standard_normal(a.shape)), at)
    gradient = jax.grad(loss)

    @jax.jit
    def derivatives(at):
        slope, bend = jax.jvp(gradient, (at,), (direction,))
        bend_by_reverse = jax.grad(lambda at: along(gradient(at), direction))(at)
        return jax.jvp(loss, (at,), (direction,))[1], slope, bend, bend_by_reverse

    @jax.jit
    def differences(at):
        ahead = jax.tree.map(lambda a, d: a + h * d, at, direction)
        behind = jax.tree.map(lambda a, d: a - h * d, at, direction)
        over = lambda a, b: (a - b) / (2 * h)  # noqa: E731
        of_gradient = jax.tree.map(over, gradient(ahead), gradient(behind))
        return over(loss(ahead), loss(behind)), of_gradient

    forward, slope, bend, bend_by_reverse = derivatives(at)
    difference, bend_by_difference = differences(at)
    np.testing.assert_allclose(forward, along(slope, direction), rtol=1e-10)
    np.testing.assert_allclose(forward, difference, rtol=1e-6, atol=1e-8)
    bends = bend, bend_by_reverse, bend_by_difference
    for a, b, c in zip(*map(jax.tree.leaves, bends), strict=True):
        size = np.abs(a).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * size)
        np.testing.assert_allclose(a, c, rtol=0, atol=1e-6 * size + 1e-8)


@cases
def test_autodiff_is_the_papers_equations(options):
    params, state = parts(options)
    forward = normalized(options, state)
    y, (dx, (dscale, dbias)) = jax.jit(
        lambda x, params, dy: (lambda y, pull: (y, pull(dy)))(*jax.vjp(forward, x, params))
    )(X, params, DY)
    truth = oracle.forward(X, params.scale, params.bias, **reference(options))
    np.testing.assert_allclose(y, truth.y, rtol=1e-12, atol=1e-12)
    gradients = oracle.backward(X, DY, params.scale, **reference(options))
    for ours, theirs in zip((dx, dscale, dbias), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max() + 1e-13)


@pytest.mark.parametrize("name", ["plain", "mask", "weights", "two axes", "no epsilon"])
def test_autodiff_is_finite_differences(name):
    """Of first and second order, forward and reverse: also of x, scale and bias mixed."""
    options = CASES[name]
    params, state = parts(options)
    run = normalized(options, state)
    assert_derivatives(lambda at: jnp.tanh(run(*at) * DY).sum(), (X, params))


def test_hessian_is_finite_differences_of_the_gradient():
    params, state = parts({})
    x, dy = jnp.asarray(X[:, 0]), DY[:, 0]
    loss = lambda x: jnp.tanh(normalized({}, state)(x, params) * dy).sum()  # noqa: E731
    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))(x)
    h = 1e-5
    for index in np.ndindex(x.shape):
        e = jnp.zeros_like(x).at[index].set(h)
        column = (gradient(x + e) - gradient(x - e)) / (2 * h)
        np.testing.assert_allclose(hessian[index], column, rtol=0, atol=1e-8)
    flat = hessian.reshape(x.size, x.size)
    np.testing.assert_allclose(flat, flat.T, rtol=0, atol=1e-12)


@cases
def test_forward_and_reverse_are_transposes(options):
    """⟨dy, J t⟩ = ⟨Jᵀ dy, t⟩."""
    params, state = parts(options)
    forward = normalized(options, state)
    random = np.random.default_rng(3)
    tangent = jnp.asarray(random.standard_normal(SHAPE))
    dparams = jax.tree.map(lambda p: jnp.asarray(random.standard_normal(p.shape)), params)
    at = jnp.asarray(X), params

    @jax.jit
    def both(tangents):
        _, pushed = jax.jvp(forward, at, tangents)
        return along(pushed, DY), along(jax.vjp(forward, *at)[1](jnp.asarray(DY)), tangents)

    pushed, pulled = both((tangent, dparams))
    np.testing.assert_allclose(pushed, pulled, rtol=1e-12)


def test_padding_that_is_not_finite_stays_at_bias_when_the_mean_moves():
    params, state = parts({})
    run = normalized({"where": MASK}, state)
    padded = lambda x: jnp.where(MASK[..., None], x, jnp.nan)  # noqa: E731
    assert_derivatives(lambda at: jnp.tanh(run(padded(at[0]), at[1]) * DY).sum(), (X, params))


def test_weights_and_epsilon_have_derivatives_too():
    params, state = parts({})

    def loss(at):
        options = {"where": at[0], "epsilon": at[1]}
        return jnp.tanh(normalized(options, state)(X, params) * DY).sum()

    assert_derivatives(loss, (WEIGHTS + 1, 0.1))


def test_normalize_has_derivatives_in_everything():
    params, _ = parts({})
    mean, var = X.mean((0, 1)), X.var((0, 1))
    loss = lambda at: jnp.tanh(bn.normalize(*at) * DY).sum()  # noqa: E731
    assert_derivatives(loss, (X, mean, var, params))


@pytest.mark.parametrize("where", [None, MASK, WEIGHTS], ids=["plain", "mask", "weights"])
def test_moments_have_derivatives(where):
    def loss(x):
        moments = bn.measure(x, where=where)
        return jnp.sin(moments.mean).sum() + jnp.sin(moments.var).sum()

    assert_derivatives(loss, X)


def test_merged_and_pooled_moments_have_derivatives():
    def merged(x):
        return bn.merge(bn.measure(x[:2]), bn.measure(x[2:]))

    def pooled(x):
        of_member = lambda x: bn.pool(bn.measure(x), "i")  # noqa: E731
        return jax.tree.map(lambda part: part[0], jax.vmap(of_member, axis_name="i")(x))

    whole = jax.jacobian(bn.measure)(X)
    for way in merged, pooled:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
            jax.jit(jax.jacobian(way))(X),
            whole,
        )


def test_no_gradient_flows_into_the_state():
    params, state = parts({})

    def remembered(x, params, state):
        _, new = bn.batch_norm(x, params, state, train=True)
        return new.mean.sum() + new.var.sum()

    gradients = jax.grad(remembered, (0, 1, 2), allow_int=True)(X, params, state)
    for gradient in jax.tree.leaves(gradients):
        assert gradient.dtype == jax.dtypes.float0 or not np.asarray(gradient).any()
    tangents = jnp.ones_like(X)
    _, pushed = jax.jvp(lambda x: remembered(x, params, state), (jnp.asarray(X),), (tangents,))
    assert pushed == 0


def test_evaluation_has_the_gradient_of_an_affine_map():
    params, state = parts({})
    state = state._replace(mean=state.mean + 0.3, var=state.var * 2)
    run = lambda x, params: bn.batch_norm(x, params, state, train=False)[0]  # noqa: E731
    _, pullback = jax.vjp(run, X, params)
    dx, (dscale, dbias) = pullback(jnp.asarray(DY))
    scale, _ = map(np.asarray, bn.as_affine(params, state))
    normalized = (X - 0.3) / np.sqrt(2 + 1e-5)
    np.testing.assert_allclose(dx, scale * DY, rtol=1e-12)
    np.testing.assert_allclose(dscale, (DY * normalized).sum((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(dbias, DY.sum((0, 1)), rtol=1e-12)


# What the theory of batch normalization says of gradients.


def layer(weights, inputs, epsilon, power=3):
    """A loss of BN(u W)."""
    params, state = bn.init(weights.shape[1], dtype=jnp.float64)
    y, _ = bn.batch_norm(inputs @ weights, params, state, train=True, epsilon=epsilon)
    return (jnp.tanh(y) * DY[:, 0]).sum() ** power


W = RANDOM.standard_normal((6, 3))
INPUTS = RANDOM.standard_normal((5, 6))


@pytest.mark.parametrize("a", [0.01, 7.0, 1e3])
def test_a_layer_does_not_feel_the_scale_of_its_weights(a):
    """BN((aW)u) = BN(Wu), ∂/∂u too; ∂/∂(aW) = (1/a) ∂/∂W (section 3.3): large weights move less."""
    epsilon = 1e-3
    value_and_grad = jax.jit(jax.value_and_grad(layer, (0, 1)))
    loss, (dw, du) = value_and_grad(W, INPUTS, epsilon)
    scaled, (dw_scaled, du_scaled) = value_and_grad(a * W, INPUTS, epsilon * a**2)
    assert float(scaled) == pytest.approx(float(loss), rel=1e-10)
    np.testing.assert_allclose(dw_scaled * a, dw, rtol=0, atol=1e-10 * np.abs(dw).max())
    np.testing.assert_allclose(du_scaled, du, rtol=0, atol=1e-10 * np.abs(du).max())


def test_the_gradient_of_weights_is_orthogonal_to_them():
    """Without ε: ⟨w, ∂L/∂w⟩ = 0, so that a step of SGD only ever lengthens them."""
    dw = jax.grad(layer)(W, INPUTS, 0.0)
    np.testing.assert_allclose(np.sum(W * dw, 0), 0, atol=1e-12 * np.abs(dw).max())
    assert np.abs(np.sum(W * jax.grad(layer)(W, INPUTS, 1.0), 0)).max() > 1e-3  # with ε, it is not


def test_the_gradient_shrinks_by_its_parts_along_one_and_along_y():
    """‖∂L/∂x‖² = γ²/σ² (‖g‖² - ⟨1, g⟩²/m - ⟨g, x̂⟩²/m): Santurkar et al. 2018, Theorem 4.1."""
    params, state = parts({})
    run = partial(normalized({"epsilon": 0.0}, state), params=params)
    _, pullback = jax.vjp(run, jnp.asarray(X))
    (dx,) = pullback(jnp.asarray(DY))
    m, batch = X.size // SHAPE[-1], (0, 1)
    f = oracle.forward(X, epsilon=0.0)
    inner = (DY**2).sum(batch) - DY.sum(batch) ** 2 / m - (DY * f.normalized).sum(batch) ** 2 / m
    np.testing.assert_allclose((dx**2).sum(batch), params.scale**2 / f.var * inner, rtol=1e-12)


# Weights: importances that can be learned.


def naive(x, weights, params, epsilon=1e-5):
    """Weighted batch norm as one would write it; JAX differentiates it step by step."""
    weights = jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (3 - weights.ndim)), x.shape)
    count = weights.sum((0, 1))
    mean = (weights * x).sum((0, 1)) / count
    var = (weights * (x - mean) ** 2).sum((0, 1)) / count
    return params.scale * (x - mean) / jnp.sqrt(var + epsilon) + params.bias


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[:-1]])
def test_weights_have_derivatives_also_where_they_are_zero(shape, lenient):
    """What is left out now may be let in: of first and second order."""
    params, state = parts({})
    weights = jnp.asarray(np.random.default_rng(4).integers(0, 3, shape).astype(float))
    assert (weights == 0).any()
    x, dy = jnp.asarray(X), jnp.asarray(DY)
    ours = lambda x, w: bn.batch_norm(x, params, state, train=True, where=w)[0]  # noqa: E731
    theirs = lambda x, w: naive(x, w, params)  # noqa: E731

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(run, x, w, along):
        gradient = jax.grad(lambda x, w: jnp.tanh(run(x, w) * dy).sum(), (0, 1))
        return jax.jvp(gradient, (x, w), along)

    along = (dy, jnp.cos(jnp.arange(weights.size, dtype=float)).reshape(shape))
    pairs = (derivatives(run, x, weights, along) for run in (ours, theirs))
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf, 1e200, -1e300])
def test_what_weighs_nothing_spoils_no_derivative_of_a_weight(padding):
    """Of first and second order: as if it were not there, for all that is."""
    params, state = parts({})
    x, weights = X.copy(), np.ones(SHAPE[:-1])
    x[1, 2], weights[1, 2] = padding, 0
    there = np.ones(SHAPE[:-1], bool)
    there[1, 2] = False

    @jax.jit
    def derivatives(x, w):
        def loss(x, w):
            y, _ = bn.batch_norm(x, params, state, train=True, where=w)
            return jnp.where(there[..., None], jnp.tanh(y * DY), 0).sum()

        gradient = jax.grad(loss, (0, 1))
        return jax.jvp(gradient, (x, w), (jnp.asarray(DY), jnp.asarray(there, float)))

    actual = derivatives(x, weights)
    expected = derivatives(np.where(there[..., None], X, 0), weights)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a[there], b[there], rtol=0, atol=1e-12)


def test_importances_have_an_effective_count():
    """Scaled by Σw/Σw², their unbiased variance is Σw(x - μ)²/(Σw - Σw²/Σw), Kish's."""
    weights = np.random.default_rng(3).uniform(0.1, 2, SHAPE[:-1])
    params, state = parts({})
    remember = lambda w: bn.batch_norm(  # noqa: E731
        X, params, state, train=True, where=w, average=bn.Ema(0)
    )
    y, new = remember(weights * weights.sum() / (weights**2).sum())
    w = weights[..., None]
    mean = (w * X).sum((0, 1)) / w.sum()
    spread = (w * (X - mean) ** 2).sum((0, 1))
    np.testing.assert_allclose(new.var, spread / (w.sum() - (w**2).sum() / w.sum()), rtol=1e-12)
    np.testing.assert_allclose(y, remember(weights)[0], rtol=1e-12)
