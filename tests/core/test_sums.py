"""The origin is near enough to the mean, and no device fetches data from another for sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bn_jax as bn
from bn_jax.conform import oracle
from bn_jax.core.centered import part_mean
from tests.devices import make_mesh

pytestmark = pytest.mark.optimized


def numbers(shape, axes):
    """Numbers per feature for data of a shape with some feature axes."""
    return jnp.zeros([n if axis in axes else 1 for axis, n in enumerate(shape)])


def size(x, axes, run=jax.jit):
    """How many values the origin is made from, if x is 1 where its batch axes begin, else 0."""
    mean = run(lambda x: part_mean(x, numbers(x.shape, axes)))(x)
    return round(1 / np.unique(mean).item())


def first(shape, axes):
    """1 where the batch axes begin, else 0."""
    x = np.zeros(shape, np.float32)
    x[tuple(slice(None) if axis in axes else 0 for axis in range(x.ndim))] = 1
    return x


@pytest.mark.parametrize(
    ("shape", "axes", "values"),
    [
        ((64, 40, 7, 64), (3,), 64 * 3 * 7),
        ((64, 64, 40, 7), (1,), 64 * 3 * 7),
        ((64, 32, 128), (2,), 64 * 2),
        ((64, 1, 40, 128), (3,), 64 * 3),
        ((64, 40, 7, 3), (3,), 64 * 7 * 7),
        ((64, 32, 3), (2,), 64 * 32),
        ((4096, 3), (1,), 256),
        ((1024, 3), (1,), 128),
        ((300, 3), (1,), 150),
        ((255, 3), (1,), 255),
        ((5, 40, 3), (2,), 5 * 40),
        ((512, 7, 3), (1, 2), 128),
    ],
)
def test_a_sixteenth_or_128_values_or_8192_numbers_or_all(shape, axes, values):
    assert size(first(shape, axes), axes) == values


def test_op_by_op_the_leading_axis_is_left_whole():
    """There, nothing says whether the array is sharded."""
    for shape, axes, values in [((4096, 3), (1,), 4096), ((64, 32, 128), (2,), 128)]:
        assert size(jnp.asarray(first(shape, axes)), axes, run=lambda f: f) == values


def test_an_axis_shorter_than_its_parts_gives_one_row():
    x = jnp.broadcast_to(jnp.arange(2 * 9 * 256.0).reshape(2, 9, 256, 1), (2, 9, 256, 16))
    mean = jax.jit(lambda x: part_mean(x, numbers(x.shape, (3,))))(x)
    np.testing.assert_array_equal(mean.ravel(), x[:, :1, :, 0].mean())


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("shape", [(8, 16, 16, 4), (2048, 4)])
def test_a_part_that_is_all_outliers_costs_four_bits_at_most(rows, shape, far=1e6):
    """Cauchy-Schwarz: the rows that draw the origin away widen the variance as well.

    That is, four bits of a plain sum's own 8 units of roundoff: deviations are up to 4 σ, squares
    up to 16 σ².
    """
    x = np.random.default_rng(rows).standard_normal(shape).astype(np.float32)
    spoiled = x[:, :rows] if x.ndim == 4 else x[: 64 * rows]
    spoiled += far
    moments, truth = jax.jit(bn.measure)(x), oracle.forward(x)
    np.testing.assert_allclose(moments.var, truth.var, rtol=16 * 8 * oracle.U)
    error = np.abs(moments.mean - truth.mean)
    assert (error <= 4 * 8 * oracle.U * (np.abs(truth.mean) + np.sqrt(truth.var))).all()


def test_sharded_axes_are_not_cut():
    rows = PartitionSpec(None, "rows")
    mesh = make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(first((16, 32, 32, 8), (3,)), NamedSharding(mesh, rows))
        for run in (jax.jit, lambda f: f):
            assert size(x, (3,), run) == 16 * 32 * 2
    mesh = make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    x = jax.device_put(first((4096, 2), (1,)), NamedSharding(mesh, PartitionSpec("rows")))
    assert size(x, (1,)) == 4096
    each = jax.shard_map(
        lambda x: jnp.full((1, 1), 1 / part_mean(x, numbers(x.shape, (1,)))[:, :1]),
        mesh=mesh,
        in_specs=PartitionSpec("rows"),
        out_specs=PartitionSpec("rows"),
    )
    x = np.zeros((4096, 2), np.float32)
    x[::1024] = 1
    np.testing.assert_allclose(jax.jit(each)(x), np.full((4, 1), 128))


def test_an_auto_mesh_moves_no_more_than_sums(shape=(8, 28, 32, 64)):
    """An inner axis may be sharded, and types do not say so: no sum gathers x."""
    mesh = make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, PartitionSpec(None, "d")))
    params, state = bn.init(64)
    loss = lambda x: jnp.sum(bn.batch_norm(x, params, state, train=True)[0] ** 3)  # noqa: E731
    hlo = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    assert "all-reduce" in hlo
    assert "all-gather" not in hlo
    assert "all-to-all" not in hlo


def training_gradients(x, params, state, **options):
    def loss(x, params):
        y, _ = bn.batch_norm(x, params, state, train=True, **options)
        return jnp.sum(y**3)

    return jax.grad(loss, (0, 1))(x, params)


@pytest.mark.parametrize(
    ("kind", "spec", "run"),
    [
        pytest.param(kind, spec, run, marks=pytest.mark.slow if run == "eager" and spec[3:] else [])
        for kind in ("plain", "mask", "weights", "uneven groups")
        for spec in ((None, "d"), (None, None, None, "d"), ("d", None, None, "f"))
        if kind != "uneven groups" or spec[0] is None  # groups may not span shards
        for run in ("jit", "eager")
        if run == "jit" or kind == "mask"  # op by op is slow
    ],
)
def test_explicit_meshes_change_no_gradient(kind, spec, run, shape=(8, 8, 4, 4)):
    """Features, or an inner axis of the batch, sharded over devices; params on all of them."""
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    options = {
        "plain": {},
        "mask": {"where": x > -1},
        "weights": {"where": np.abs(x)},
        "uneven groups": {"group_size": 3},
    }[kind]
    params, state = bn.init(4)
    step = functools.partial(training_gradients, **options)
    expected = jax.device_get(jax.jit(step)(x, params, state))
    mesh = make_mesh((2, 2), ("d", "f"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        run_step = jax.jit(step) if run == "jit" else step
        found = jax.device_get(run_step(sharded, *jax.device_get((params, state))))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )


def test_members_on_an_explicit_mesh_may_share_a_mask(shape=(4, 8, 8, 3)):
    x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    measure = jax.jit(jax.vmap(functools.partial(bn.measure, where=x[0] > 0)))
    expected = jax.device_get(measure(x))
    mesh = make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
        found = jax.device_get(measure(sharded))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, expected
    )
