"""The origin: near enough, and no part of x that another device holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bn_jax as bn
from bn_jax.bench import oracle
from bn_jax.core.origin import mean_of_part, part_p
from tests.devices import make_mesh

pytestmark = pytest.mark.optimized


def size(x, axes, run=jax.jit):
    """How many values the origin is made of, if x is 1 where its batch axes begin, else 0."""
    mean = run(lambda x: part_p.bind(x, axes=axes))(x)
    return round(1 / np.unique(mean).item())


def first(shape, axes):
    """1 where the batch axes begin, else 0."""
    x = np.zeros(shape, np.float32)
    x[tuple(slice(None) if axis in axes else 0 for axis in range(x.ndim))] = 1
    return x


@pytest.mark.parametrize(
    ("shape", "axes", "values"),
    [
        ((64, 40, 7, 3), (3,), 64 * 3 * 7),
        ((64, 3, 40, 7), (1,), 64 * 3 * 7),
        ((64, 32, 3), (2,), 64 * 2),
        ((64, 1, 40, 3), (3,), 64 * 3),
        ((4096, 3), (1,), 256),
        ((1024, 3), (1,), 128),
        ((300, 3), (1,), 150),
        ((255, 3), (1,), 255),
        ((5, 40, 3), (2,), 5 * 40),
        ((512, 7, 3), (1, 2), 128),
    ],
)
def test_a_sixteenth_or_128_values_or_all(shape, axes, values):
    assert size(first(shape, axes), axes) == values


def test_op_by_op_the_leading_axis_is_left_whole():
    """There, nothing says whether the array is spread over devices."""
    for shape, axes, values in [((4096, 3), (1,), 4096), ((64, 32, 3), (2,), 128)]:
        assert size(jnp.asarray(first(shape, axes)), axes, run=lambda f: f) == values


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("shape", [(8, 16, 16, 4), (2048, 4)])
def test_a_part_that_is_all_outliers_costs_four_bits_at_most(rows, shape, far=1e6):
    """Cauchy-Schwarz: the rows that draw the origin away widen the variance as well.

    Of a plain sum's own 8 units of roundoff, that is: deviations are up to 4 σ, squares 16 σ².
    """
    x = np.random.default_rng(rows).standard_normal(shape).astype(np.float32)
    spoiled = x[:, :rows] if x.ndim == 4 else x[: 64 * rows]
    spoiled += far
    moments, truth = jax.jit(bn.measure)(x), oracle.forward(x)
    np.testing.assert_allclose(moments.var, truth.var, rtol=16 * 8 * oracle.U)
    error = np.abs(moments.mean - truth.mean)
    assert (error <= 4 * 8 * oracle.U * (np.abs(truth.mean) + np.sqrt(truth.var))).all()


def test_axes_that_are_spread_over_devices_are_not_cut():
    rows = PartitionSpec(None, "rows")
    mesh = make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(first((16, 32, 32, 2), (3,)), NamedSharding(mesh, rows))
        for run in (jax.jit, lambda f: f):
            assert size(x, (3,), run) == 16 * 32 * 2
    mesh = make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    x = jax.device_put(first((4096, 2), (1,)), NamedSharding(mesh, PartitionSpec("rows")))
    assert size(x, (1,)) == 4096


def test_an_axis_shorter_than_its_parts_gives_one_row():
    x = jnp.arange(2 * 9 * 256.0).reshape(2, 9, 256, 1)
    assert mean_of_part(x, axes=(3,), within=(1,)) == x[:, :1].mean()
