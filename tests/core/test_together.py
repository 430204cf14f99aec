"""Sums in one pass are the sums, whatever is done to them, and no device fetches for them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bn_jax as bn
from bn_jax.core.stored import stored
from bn_jax.core.together import add_over, add_together, spread_together
from tests.devices import make_mesh

pytestmark = pytest.mark.optimized

# Shapes and feature axes: cut in blocks along one axis or another, or along none.
CASES = [
    ((5, 14, 3, 4), (3,)),
    ((5, 3, 16, 4), (3,)),
    ((3, 4, 28, 2), (1,)),
    ((60, 7), (1,)),
    ((1021, 3), (1,)),
    ((1, 8), (0,)),
    ((6, 2, 5, 3), (1, 3)),
    ((8,), ()),
    ((4, 3), (0, 1)),
]


def arrays(shape, count=2):
    random = np.random.default_rng(len(shape))
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(count)]


def sums(arrays, axes):
    reduced = tuple(axis for axis in range(arrays[0].ndim) if axis not in axes)
    return [np.asarray(array, np.float64).sum(reduced) for array in arrays]


def natural_spread(values, x, axes):
    shape = [n if axis in axes else 1 for axis, n in enumerate(x.shape)]
    return [jnp.broadcast_to(value.reshape(shape), x.shape) for value in values]


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_the_sums_are_the_sums(shape, axes, count, run):
    parts = arrays(shape, count)
    found = run(functools.partial(add_together, axes=axes))(parts)
    for one, truth in zip(found, sums(parts, axes), strict=True):
        np.testing.assert_allclose(one, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 20, 2, 3), (64, 9, 2, 7)])
def test_small_sums_are_not_added_up_one_by_one(shape, axes=(0, 1, 3)):
    """That would be off by up to 16 units of roundoff here; in two steps it is 2 to 4."""
    x = arrays(shape)[0] ** 2
    found = jax.jit(functools.partial(add_over, axes=axes))(x)
    np.testing.assert_allclose(found, np.asarray(x, np.float64).sum(axes), rtol=6 * 2.0**-24)


def test_sums_of_nothing_are_zero():
    found = jax.jit(functools.partial(add_together, axes=(2,)))([jnp.ones((0, 16, 3))] * 2)
    np.testing.assert_array_equal(found, np.zeros((2, 3)))


def test_arrays_may_differ_in_dtype():
    x = arrays((4, 16, 3))[0]
    parts = [jax.lax.complex(x, 2 * x), x, jnp.ones_like(x, int)]
    total, real, count = jax.jit(lambda parts: add_together(parts, (2,)))(parts)
    (truth,) = sums([x], (2,))
    np.testing.assert_allclose(total, truth + 2j * truth, atol=1e-5)
    np.testing.assert_allclose(real, truth, atol=1e-5)
    np.testing.assert_array_equal(count, [64, 64, 64])


@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_what_is_spread_transposes_into_the_sums(shape, axes):
    """As JAX's own broadcasts do: forward, backward, and the Hessian through both."""
    x, weight = arrays(shape)
    values = [part[tuple(0 if n not in axes else slice(None) for n in range(x.ndim))] for part in
              arrays(shape)]  # fmt: skip

    def loss(spread, values, x):
        slope, offset = spread(values, x, axes)
        return jnp.sum(weight * jnp.square(slope * x + offset) * x)

    ours, plain = (functools.partial(loss, f) for f in (spread_together, natural_spread))
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance),
        [jax.grad(ours, (0, 1))(values, x), jax.jit(jax.hessian(ours))(values, x),
         jax.jit(jax.grad(ours))(values, x), jax.jvp(ours, (values, x), (values, x))],
        [jax.grad(plain, (0, 1))(values, x), jax.jit(jax.hessian(plain))(values, x),
         jax.jit(jax.grad(plain))(values, x), jax.jvp(plain, (values, x), (values, x))],
    )  # fmt: skip


@pytest.mark.parametrize("which", [(0, None), (None, 1), (0, 2)])
def test_vmap_adds_a_feature_axis(which, shape=(3, 4, 16, 2)):
    """Over the first, the second, or both of two arrays, along different axes."""
    batched = [
        jnp.stack([part, 2 * part, -part], axis) if axis is not None else part
        for part, axis in zip(arrays(shape), which, strict=True)
    ]
    add = lambda a, b: add_together([a, b], (3,))  # noqa: E731
    found = jax.jit(jax.vmap(add, in_axes=which))(*batched)
    for part, axis, one in zip(batched, which, found, strict=True):
        whole = np.moveaxis(part, axis, 0) if axis is not None else np.stack([part] * 3)
        np.testing.assert_allclose(one, whole.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


def lowered(run, *args, platform="cpu"):
    return jax.jit(run).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def cuts(hlo):
    """The axes that reductions of several arrays at once go over."""
    return re.findall(r"stablehlo.reduce\(%\S+ init: %\S+\), \(.* dimensions = \[(\d)\]", hlo)


@pytest.mark.parametrize(
    ("shape", "axes", "axis"),
    [
        ((5, 14, 3, 4), (3,), ["1"]),
        ((5, 3, 16, 4), (3,), ["2"]),
        ((60, 7), (1,), ["0"]),
        ((1021, 3), (1,), []),
    ],
)
def test_an_axis_is_cut_on_the_cpu_alone(shape, axes, axis):
    run = functools.partial(add_together, axes=axes)
    assert cuts(lowered(run, arrays(shape))) == axis
    for platform in ("cuda", "tpu"):
        assert cuts(lowered(run, arrays(shape), platform=platform)) == []


def test_a_batch_that_may_be_spread_over_devices_is_not_cut():
    mesh = make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("rows")
    x = jax.device_put(np.ones((128, 3), np.float32), NamedSharding(mesh, rows))

    def run(x):
        return add_together([x, x], (1,))

    assert cuts(lowered(run, x)) == []
    assert cuts(lowered(run, np.asarray(x))) == ["0"]
    each = jax.shard_map(lambda x: [s[None] for s in run(x)], mesh=mesh, in_specs=rows,
                         out_specs=rows)  # fmt: skip
    assert cuts(lowered(each, x)) == ["0"]


def test_an_axis_that_is_spread_explicitly_is_not_cut():
    mesh = make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, "rows"))
        x = jax.device_put(np.ones((4, 16, 8, 2), np.float32), sharding)
        run = jax.jit(lambda x: add_together([x, x], (3,)))
        assert cuts(run.lower(x).as_text()) == ["2"]
        np.testing.assert_array_equal(run(x)[0], [512, 512])


def test_an_auto_mesh_moves_no_more_than_sums(shape=(8, 28, 32, 4)):
    """An inner axis may be spread, and types do not say so: no sum gathers x."""
    mesh = make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, PartitionSpec(None, "d")))
    params, state = bn.init(4)
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
    """Features, or an inner axis of the batch, spread over devices; params on all of them."""
    x = arrays(shape)[0]
    options = {
        "plain": {},
        "mask": {"where": np.asarray(x > -1)},
        "weights": {"where": np.abs(np.asarray(x))},
        "uneven groups": {"group_size": 3},
    }[kind]
    params, state = bn.init(4)
    step = functools.partial(training_gradients, **options)
    expected = jax.device_get(jax.jit(step)(x, params, state))
    mesh = make_mesh((2, 2), ("d", "f"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spread = jax.device_put(np.asarray(x), NamedSharding(mesh, PartitionSpec(*spec)))
        run_step = jax.jit(step) if run == "jit" else step
        found = jax.device_get(run_step(spread, *jax.device_get((params, state))))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected
    )


def test_members_on_an_explicit_mesh_may_share_a_mask(shape=(4, 8, 8, 3)):
    x = arrays(shape)[0]
    where = np.asarray(x[0] > 0)
    measure = jax.jit(jax.vmap(functools.partial(bn.measure, where=where)))
    expected = jax.device_get(measure(x))
    mesh = make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(np.asarray(x), NamedSharding(mesh, PartitionSpec("d")))
        found = jax.device_get(measure(spread))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, expected
    )


def test_what_is_stored_is_the_same_under_every_transformation():
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)

    def cube(x):
        return stored(x) * stored(x) * x

    for run in (cube, jax.jit(cube), jax.vmap(cube)):
        np.testing.assert_array_equal(run(x), x * x * x)
    np.testing.assert_array_equal(jax.jvp(cube, (x,), (x,))[1], 3 * x * x * x)
    np.testing.assert_array_equal(jax.grad(lambda x: cube(x).sum())(x), 3 * x * x)
    assert jax.grad(jax.grad(cube))(jnp.bfloat16(2)) == 12


@pytest.mark.parametrize(("dtype", "barriers"), [(jnp.bfloat16, 1), (jnp.float32, 0)])
def test_only_half_precision_is_held_and_on_the_cpu_alone(dtype, barriers):
    for platform, count in {"cpu": barriers, "cuda": 0, "tpu": 0}.items():
        hlo = lowered(stored, jnp.ones(3, dtype), platform=platform)
        assert hlo.count("stablehlo.optimization_barrier") == count, platform
