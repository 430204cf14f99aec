"""The laws of batch normalization, which hold for every batch.

Where a law is exact in floating point (scaling by powers of two, negation, a mask against the
same values removed and summed in another order), it is tested as such. Elsewhere the tolerance
is the accuracy bar of y, 5e-6 standard deviations: each side of a law is that near the truth.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bn_jax as bn
from bn_jax.conform import oracle
from tests.core.draws import anything, batches, few, laws, normals, permutations

pytestmark = pytest.mark.optimized

M, C = 12, 3
BAR = 5e-6
PARAMS = bn.BatchNormParams(jnp.array([1.5, -0.5, 1.0]), jnp.array([0.25, 2.0, -1.0]))
STATE = bn.init(C)[1]


@partial(jax.jit, static_argnames=("average", "unbiased"))
def step(
    x, dy, where=None, epsilon=1e-5, average=bn.DebiasedEma(0.99), unbiased=True, params=PARAMS
):
    """Y, the new state and the gradients of x and the parameters, given those of y."""

    def forward(x, params):
        return bn.batch_norm(
            x,
            params,
            STATE,
            train=True,
            where=where,
            epsilon=epsilon,
            average=average,
            unbiased=unbiased,
        )

    y, pullback, state = jax.vjp(forward, x, params, has_aux=True)
    return y, state, *pullback(dy)


evaluate = jax.jit(lambda x, state: bn.batch_norm(x, PARAMS, state, train=False)[0])


def assert_same_step(a, b, dy):
    """Two steps agree in y, state and all gradients (of dy), up to rounding.

    The gradient of x is the difference of the terms γ r dy, γ r E dy and γ r x̂ E[dy·x̂], so they are
    its measure: where dy happens to be nearly in line with x, dx itself can be as small as one
    likes. Masked-out values may lie far from the mean, and are then rounded at their own size.
    """
    (ya, sa, dxa, dpa), (yb, sb, dxb, dpb) = a, b
    np.testing.assert_allclose(ya, yb, rtol=8 * oracle.U, atol=2 * 1.5 * BAR)  # |γ| ≤ 1.5, 2 sides
    size = np.abs(sb.mean) + np.sqrt(sb.var)
    assert (np.abs(sa.mean - sb.mean) <= 8 * oracle.U * size).all()
    np.testing.assert_allclose(sa.var, sb.var, rtol=2e-6, atol=1e-37)
    np.testing.assert_array_equal(sa.count, sb.count)
    yb, dy, scale, bias = map(np.asarray, (yb, dy, PARAMS.scale, PARAMS.bias))
    normalized = np.abs(yb - bias) / np.abs(scale)
    along = np.abs(dy).sum(0), (np.abs(dy) * normalized).sum(0)
    terms = np.abs(dy) + (along[0] + normalized * along[1]) / M
    size = np.abs(scale) / np.sqrt(np.asarray(sb.var) + 1e-5) * terms.max(0)
    assert (np.abs(dxa - dxb) <= 4e-6 * size).all()
    for da, db, sum_of in zip(dpa, dpb, along[::-1], strict=True):
        np.testing.assert_array_less(np.abs(da - db), 4e-6 * (sum_of + M))


@laws
@given(batches((M, C)), normals((M, C)), permutations(M), anything, st.booleans())
def test_masked_is_removed(x, dy, order, padding, full):
    kept = np.sort(order[:7])
    mask = np.isin(np.arange(M), kept)
    dy = np.where(mask[:, None], dy, 0)
    padded = jnp.where(mask[:, None], x, padding)
    where = jnp.broadcast_to(mask[:, None], (M, C)) if full else jnp.asarray(mask)
    y, state, dx, dparams = step(padded, dy, where)
    assert_same_step((y[kept], state, dx[kept], dparams), step(x[kept], dy[kept]), dy[kept])
    assert np.isfinite(y).all()
    if not np.isfinite(padding):
        np.testing.assert_array_equal(dx[~mask], 0)


@laws
@given(batches((M, C)), normals((M, C)), normals((M, C)))
def test_each_feature_may_have_a_mask_of_its_own(x, dy, keys):
    kept = np.argsort(keys, 0)[:7]
    mask = np.zeros((M, C), bool)
    np.put_along_axis(mask, kept, True, 0)
    dy = np.where(mask, dy, 0)
    y, state, dx, dparams = step(jnp.where(mask, x, jnp.nan), dy, jnp.asarray(mask))
    pick = partial(np.take_along_axis, indices=kept, axis=0)
    removed = step(pick(x), pick(dy))
    assert_same_step((pick(np.asarray(y)), state, pick(np.asarray(dx)), dparams), removed, pick(dy))


@laws
@given(batches((M, C)), normals((2 * M, C)), permutations(M))
def test_a_weight_of_k_is_the_value_repeated_k_times(x, dy, order):
    weights = np.array([0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5])[order]
    copies = np.repeat(np.arange(M), weights)
    y, state, dx, dparams = step(x[copies], dy)
    # A weighted value has one output, that of all its copies, whose gradients therefore add up.
    add_up = partial(np.add.reduceat, indices=np.flatnonzero(np.diff(copies, prepend=-1)))
    there = weights > 0
    summed = np.zeros((M, C), np.float32)
    summed[there] = add_up(np.asarray(dy))
    first = np.flatnonzero(np.diff(copies, prepend=-1))
    repeated = y[first], state, add_up(np.asarray(dx)), dparams
    wy, wstate, wdx, wdparams = step(x, summed, jnp.asarray(weights))
    assert_same_step((wy[there], wstate, wdx[there], wdparams), repeated, summed[there])
    # As floats, they are importances: the same y and gradients, and a variance that is remembered
    # as of the effective count n instead of m.
    fy, fstate, fdx, fdparams = step(x, summed, jnp.asarray(weights, jnp.float32))
    m, n = weights.sum(), weights.sum() ** 2 / (weights**2).sum()
    fstate = fstate._replace(var=fstate.var * ((n - 1) / n * m / (m - 1)))
    assert_same_step((fy[there], fstate, fdx[there], fdparams), repeated, summed[there])


@laws
@given(batches((M, C)), normals((M, C)))
def test_a_mask_is_weights_of_zero_and_one(x, keys):
    mask, dy = jnp.asarray(keys > -0.5), keys
    assert_same_step(step(x, dy, mask), step(x, dy, mask.astype(jnp.float32)), dy)


@laws
@given(batches((M, C)), normals((M, C)), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_nothing_at_all(x, dy, exponent):
    """With a² ε on the scaled side: σ² and ε scale alike, so the law is exact for every ε."""
    a = 2.0**exponent
    y, state, dx, dparams = step(x, dy, epsilon=1e-5)
    scaled = step(a * x, dy, epsilon=np.float32(1e-5) * a**2, average=bn.Ema(0.0))
    np.testing.assert_array_equal(scaled[0], y)
    np.testing.assert_array_equal(scaled[1].mean, a * state.mean)
    np.testing.assert_array_equal(scaled[1].var, a**2 * state.var)
    np.testing.assert_array_equal(scaled[2] * a, dx)
    jax.tree.map(np.testing.assert_array_equal, scaled[3], dparams)


@few
@given(batches((M, C), largest=100.0), st.floats(0.01, 100), st.floats(-100, 100))
def test_a_positive_affine_map_of_x_changes_nothing(x64, x, a, b):
    x, params = x.astype(np.float64), bn.BatchNormParams(None, None)
    state = bn.init(C, dtype=jnp.float64)[1]
    norm = partial(bn.batch_norm, params=params, state=state, train=True)
    y, _ = norm(x, epsilon=1e-5)
    moved, _ = norm(a * x + b, epsilon=1e-5 * a**2)
    # a·x + b is rounded at its own size, which is what is seen of the law after dividing by aσ.
    size = np.abs(a * x).max() + abs(b)
    std = np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_array_less(np.abs(moved - y).max(0), 1e-12 + 1e-14 * size / (a * std))


@laws
@given(normals((M, C)), st.integers(-8, 8))
def test_shifting_x_changes_nothing(x, thousands):
    x, b = np.round(1000 * x), 1000.0 * thousands  # integers, so that the shift itself is exact
    dy = x[::-1] / 1000
    (y, moved, *gradients), still = step(x + b, dy), step(x, dy)
    assert (np.abs(moved.mean - (still[1].mean + b)) <= np.spacing(np.float32(abs(b) + 1e3))).all()
    assert_same_step((y, moved._replace(mean=still[1].mean), *gradients), still, dy)


@laws
@given(batches((M, C)), normals((M, C)))
def test_negating_x_negates_its_normalized_value(x, dy):
    plain = bn.BatchNormParams(None, None)
    (y, state, dx, _), (minus_y, minus, same_dx, _) = (step(z, dy, params=plain) for z in (x, -x))
    np.testing.assert_array_equal(minus_y, -y)
    np.testing.assert_array_equal(minus.mean, -state.mean)
    np.testing.assert_array_equal(minus.var, state.var)
    np.testing.assert_array_equal(same_dx, dx)


@laws
@given(batches((M, C)), normals((M, C)), permutations(M))
def test_the_order_of_the_batch_does_not_matter(x, dy, order):
    y, state, dx, dparams = step(x, dy)
    moved = step(x[order], dy[order])
    assert_same_step(moved, (y[order], state, dx[order], dparams), dy[order])
    np.testing.assert_allclose(moved[0], y[order], rtol=0, atol=8 * 2**-23 * np.abs(y).max())


@laws
@given(batches((M, C)), normals((M, C)))
def test_the_gradient_of_x_is_orthogonal_to_constants_and_nearly_to_x(x, dy):
    """Σ dx = 0 and Σ dx·x̂ = γ r Σ(dy·x̂) ε/(σ² + ε): the loss cannot change with μ or (ε=0) σ."""
    _, _, dx, _ = step(x, dy)
    f = oracle.forward(x)
    sum_dx, sum_along = np.asarray(dx, np.float64).sum(0), (dx * f.normalized).sum(0)
    projected = PARAMS.scale * f.inverse_std * (dy * f.normalized).sum(0)
    size = np.abs(PARAMS.scale) * f.inverse_std * np.sqrt((dy**2).sum(0) * M)
    assert (np.abs(sum_dx) <= 2e-6 * size).all()
    assert (np.abs(sum_along - projected * 1e-5 / (f.var + 1e-5)) <= 4e-6 * size).all()


@laws
@given(batches((M, C)), normals(C), normals(C))
def test_evaluation_is_an_affine_map(x, mean, log_var):
    state = bn.BatchNormState(100 * mean, jnp.exp(log_var), jnp.ones(C, jnp.int32))
    y = evaluate(x, state)
    scale, offset = map(np.asarray, bn.as_affine(PARAMS, state))
    affine = scale * x + offset
    # The affine form adds two large numbers, each rounded several times.
    slack = 6 * oracle.U * (np.abs(scale) * np.abs(x) + np.abs(scale * state.mean) + 2)
    assert (np.abs(affine - y) <= slack).all()


@laws
@given(batches((M, C)))
def test_training_is_evaluation_by_the_batch_itself(x):
    y, state, *_ = step(x, jnp.zeros_like(x), average=bn.Ema(0.0), unbiased=False)
    by_batch = bn.normalize(x, state.mean, state.var, PARAMS)
    # The stored mean is rounded, which training is spared.
    ulp, std = np.spacing(np.abs(x).max()), np.sqrt(state.var + 1e-5)
    np.testing.assert_array_less(np.abs(by_batch - y).max(0), 1.5 * (2 * BAR + ulp / std))


AXES = [(-1,), (1,), (0,), (0, 2), (1, 2), (-3, -1), (0, 1, 2)[1:], ()]


@pytest.mark.parametrize("axis", [*AXES, [1, 2], -2])
def test_any_axes_may_be_the_features(axis, shape=(4, 3, 5)):
    random = np.random.default_rng(1)
    x, dy = random.standard_normal((2, *shape)).astype(np.float32)
    where = random.integers(0, 3, shape).astype(np.float32)
    sizes = tuple(n for a, n in enumerate(shape) if a in {b % 3 for b in oracle.features(axis)})
    scale = random.standard_normal(sizes).astype(np.float32)
    bias = random.standard_normal(sizes).astype(np.float32)
    _, state = bn.init(sizes)
    options = {"train": True, "feature_axis": axis, "where": where, "average": bn.Ema(0.0)}

    def forward(x, params):
        return bn.batch_norm(x, params, state, unbiased=False, **options)

    @jax.jit
    def outcome(x, params, dy):
        y, pullback, new = jax.vjp(forward, x, params, has_aux=True)
        return y, new, *pullback(dy)

    y, new, dx, dparams = outcome(x, bn.BatchNormParams(scale, bias), dy)
    ordered = tuple(sorted(a % 3 for a in oracle.features(axis)))
    truth = oracle.forward(x, scale, bias, axis=ordered, weights=where)
    np.testing.assert_allclose(y, truth.y, rtol=8 * oracle.U, atol=BAR * np.abs(scale).max())
    np.testing.assert_allclose(new.mean, truth.mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(new.var, truth.var, rtol=1e-6)
    gradients = oracle.backward(x, dy, scale, axis=ordered, weights=where)
    for ours, theirs in zip((dx, *dparams), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 7), (1, 1), (5, 7), (5, 7, 3), (1, 1, 3)])
def test_where_broadcasts_as_documented(shape):
    """Of x's shape, of x's without the feature axes, or broadcastable to either."""
    random = np.random.default_rng(2)
    x = random.standard_normal((5, 7, 3)).astype(np.float32)
    where = random.integers(1, 4, shape).astype(np.float32)
    if len(shape) == 1:
        x = x[:, 0]
    truth = oracle.forward(x, weights=np.broadcast_to(expanded(where, x), x.shape))
    moments = bn.measure(x, where=where)
    np.testing.assert_array_equal(moments.count, truth.count)
    np.testing.assert_allclose(moments.mean, truth.mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(moments.var, truth.var, rtol=1e-6)


def expanded(where, x):
    return where[..., None] if where.ndim == x.ndim - 1 else where


@pytest.mark.parametrize("axes", [(2, 1), (-1, 1), (-1, -2)])
def test_feature_axes_may_be_named_in_any_order(axes):
    """Features stand in the order of x's own axes."""
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    params, state = bn.init((2, 3))
    run = partial(bn.batch_norm, x, params, state, train=True)
    for a, b in zip(
        *map(jax.tree.leaves, (run(feature_axis=axes), run(feature_axis=(1, 2)))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
