"""What a training step reads and writes: x and dy some times over, y and dx once, no more."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.bench import oracle
from bn_jax.core.apart import apart
from bn_jax.core.sums import pilot

SHAPE = (16, 28, 28, 32)
fuses = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA's CPU sums what it has written first"
)


def training_step(x, params, state, dy):
    y, pullback, state = jax.vjp(
        lambda x, params: bn.batch_norm(x, params, state, train=True), x, params, has_aux=True
    )
    return y, state, pullback(dy)


def written(dtype, shape=SHAPE):
    """The arrays of x's size, in dtypes, that the compiled step writes."""
    params, state = bn.init(shape[-1])
    x = jax.ShapeDtypeStruct(shape, dtype)
    step = lambda *args: training_step(*args)  # noqa: E731 - a new one, traced anew
    hlo = jax.jit(step).lower(x, params, state, x).compile().as_text()
    entry = hlo[hlo.index("\nENTRY") :]
    size = ",".join(map(str, shape))
    return sorted(re.findall(rf"= (\w+)\[{size}\]\S* (?!parameter)\w+\(", entry))


@fuses
def test_only_y_and_dx_are_written_in_float32():
    assert written(jnp.float32) == ["f32", "f32"]


@fuses
def test_half_precision_writes_little_more():
    """The output's gradient in float32, for three to read; jax 0.12 widens another."""
    results, widened = written(jnp.bfloat16)[:2], written(jnp.bfloat16)[2:]
    assert results == ["bf16", "bf16"]
    assert widened in (["f32"], ["f32", "f32"])


@fuses
def test_without_apart_there_would_be_more(monkeypatch):
    """The proof can fail."""
    monkeypatch.setattr("bn_jax.core.sums.apart", lambda values, copies: [values] * copies)
    monkeypatch.setattr("bn_jax.core.standardize.apart", lambda values, copies: [values] * copies)
    assert len(written(jnp.float32)) > 2


def test_apart_is_the_identity_under_every_transformation():
    x, dot = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))

    def double(x):
        (a,), (b,) = apart((x,), 2)
        return a + b

    for run in (double, jax.jit(double), jax.vmap(double)):
        np.testing.assert_array_equal(run(x), 2 * x)
    np.testing.assert_array_equal(jax.jvp(double, (x,), (dot,))[1], 2 * dot)
    np.testing.assert_array_equal(jax.grad(lambda x: double(x).sum())(x), 2 * dot)
    assert jax.grad(jax.grad(lambda x: double(x) ** 3))(1.0) == 48


def test_apart_is_a_barrier_on_the_cpu_alone():
    def run(x):
        return apart((x,), 2)

    for platform, barriers in {"cpu": 1, "cuda": 0, "tpu": 0}.items():
        exported = jax.export.export(jax.jit(run), platforms=[platform])(jnp.ones(3))
        assert exported.mlir_module().count("stablehlo.optimization_barrier") == barriers, platform


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_x_and_numbers_per_feature_are_kept_for_the_backward_pass(dtype, masked, shape=(64, 32)):
    """And a mask, where there is one."""
    params, state = bn.init(shape[-1])
    where = jnp.ones(shape, bool) if masked else None

    def pullback(x, params):
        train = lambda x, params: bn.batch_norm(x, params, state, train=True, where=where)[0]  # noqa: E731
        return jax.vjp(train, x, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, jnp.zeros(shape, dtype), params))
    large = sorted(str(a.dtype) for a in kept if a.size > 4 * shape[-1])
    assert large == sorted([str(jnp.dtype(dtype)), *(["bool"] if masked else [])])


# The pilot.


@pytest.mark.parametrize(
    ("shape", "axes", "kept"),
    [
        ((5, 40, 7, 3), (3,), (5, 3, 7, 3)),
        ((5, 3, 40, 7), (1,), (5, 3, 3, 7)),
        ((5, 2, 3), (2,), (5, 1, 3)),
        ((5, 1, 9, 3), (3,), (5, 1, 1, 3)),
        ((50, 3), (1,), (50, 3)),
        ((5, 7, 3), (1, 2), (5, 7, 3)),
    ],
)
def test_a_sixteenth_of_each_example_is_a_pilot(shape, axes, kept):
    assert pilot(jnp.zeros(shape), axes).shape == kept


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_pilot_that_is_all_outliers_costs_four_bits_at_most(rows, far=1e6):
    """Cauchy-Schwarz: the rows that draw the origin away widen the variance as well."""
    x = np.random.default_rng(rows).standard_normal((8, 16, 16, 4)).astype(np.float32)
    x[:, :rows] += far
    moments, truth = jax.jit(bn.measure)(x), oracle.forward(x)
    np.testing.assert_allclose(moments.var, truth.var, rtol=16 * 4 * oracle.U)
    error = np.abs(moments.mean - truth.mean)
    assert (error <= 8 * oracle.U * (np.abs(truth.mean) + np.sqrt(truth.var))).all()


def test_explicitly_sharded_axes_are_not_cut():
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(
            np.ones((4, 32, 8, 2), np.float32),
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "rows")),
        )
        assert jax.jit(lambda x: pilot(x, (3,)))(x).shape == (4, 32, 1, 2)
