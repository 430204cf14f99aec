"""Sums in one pass are the sums; and whether XLA still needs to be told (canaries)."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax.core.xla.sums import SMALL, add_together, add_up
from tests.devices import make_mesh

pytestmark = pytest.mark.optimized

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA's CPU compiler")

# Shapes and axes to sum over: cut in blocks along one axis or another, or along none.
CASES = [
    ((8, 28, 16, 64), (0, 1, 2)),
    ((8, 3, 16, 512), (0, 1, 2)),
    ((3, 4, 28, 64), (0, 2, 3)),
    ((4096, 7), (0,)),
    ((8191, 3), (0,)),
    ((60, 7), (0,)),
    ((6, 2, 5, 3), (0, 2)),
    ((8,), (0,)),
    ((4, 3), ()),
    ((2, 3, 2, 5, 2, 7, 3, 16), (0, 1, 3, 6)),
]


def arrays(shape, count=2):
    random = np.random.default_rng(len(shape))
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(count)]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("shape", "axes"), CASES)
def test_the_sums_are_the_sums(shape, axes, alone):
    parts = arrays(shape, 3)
    found = jax.jit(lambda parts: add_together(parts, axes, alone))(parts)
    for one, part in zip(found, parts, strict=True):
        truth = np.asarray(part, np.float64).sum(axes, keepdims=True)
        np.testing.assert_allclose(one, truth, rtol=1e-5, atol=1e-4)


def test_sums_of_nothing_are_zero():
    found = jax.jit(lambda parts: add_together(parts, (0, 1), True))([jnp.ones((0, 16, 3))] * 2)
    np.testing.assert_array_equal(found, np.zeros((2, 1, 1, 3)))


@pytest.mark.parametrize("shape", [(64, 20, 2, 3), (64, 9, 2, 7)])
def test_small_sums_are_not_added_up_one_by_one(shape, axes=(0, 1, 3)):
    """That would be off by up to 16 units of roundoff here; in two steps it is 2 to 4."""
    x = arrays(shape)[0] ** 2
    found = jax.jit(functools.partial(add_up, axes=axes))(x)
    truth = np.asarray(x, np.float64).sum(axes, keepdims=True)
    np.testing.assert_allclose(found, truth, rtol=6 * 2.0**-24)


def cuts(run, *args):
    """The axes that reductions of several arrays at once go over, as lowered for the CPU."""
    hlo = jax.jit(run).lower(*args).as_text()
    return re.findall(r"stablehlo.reduce\(%\S+ init: %\S+\), \(.* dimensions = \[(\d)\]", hlo)


@pytest.mark.parametrize(
    ("shape", "axes", "alone", "axis"),
    [
        ((8, 28, 16, 64), (0, 1, 2), True, ["1"]),
        ((8, 3, 16, 512), (0, 1, 2), True, ["2"]),
        ((8, 28, 16, 4), (0, 1, 2), True, []),
        ((4096, 7), (0,), True, ["0"]),
        ((4096, 7), (0,), False, []),
        ((8191, 3), (0,), True, []),
        ((60, 7), (0,), True, []),
    ],
)
def test_an_axis_is_cut_if_it_is_on_one_device_and_pays(shape, axes, alone, axis):
    assert cuts(lambda parts: add_together(parts, axes, alone), arrays(shape)) == axis


def test_an_axis_that_is_sharded_explicitly_is_not_cut():
    mesh = make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, "rows"))
        x = jax.device_put(np.ones((16, 16, 16, 32), np.float32), sharding)
        run = lambda x: add_together([x, x], (0, 1, 2), False)  # noqa: E731
        assert cuts(run, x) == ["2"]
        np.testing.assert_array_equal(jax.jit(run)(x)[0].ravel(), [4096] * 32)


def copies_of_x(run, shape):
    """How many arrays of x's size a compiled function writes."""
    hlo = jax.jit(run).lower(jnp.ones(shape), jnp.ones((1, 1, 1, shape[-1]))).compile().as_text()
    entry = hlo[hlo.index("\nENTRY") :]
    size = ",".join(map(str, shape))
    return len(re.findall(rf"= f32\[{size}\]\S* (?!parameter)[\w-]+\(", entry))


@on_a_cpu
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="writes them in any case")
def test_ours_writes_no_copy_of_x(shape=(16, 28, 28, 32)):
    def run(x, origin):
        d = x - origin
        return add_together([d, d * d], (0, 1, 2), True)

    assert copies_of_x(run, shape) == 0


# Canaries: plain JAX. When one of these passes, the workaround that names it may go.


@on_a_cpu
@pytest.mark.xfail(
    jax.__version_info__ >= (0, 10),
    strict=True,
    reason="XLA's CPU compiler does not fuse sibling reductions",
)
def test_xla_fuses_sibling_sums(shape=(16, 28, 28, 32)):
    """It writes d, which both sums read."""

    def run(x, origin):
        d = x - origin
        return jnp.sum(d, (0, 1, 2)), jnp.sum(d * d, (0, 1, 2))

    assert copies_of_x(run, shape) == 0


@on_a_cpu
@pytest.mark.xfail(
    jax.__version_info__ >= (0, 10),
    strict=True,
    reason="XLA's CPU compiler adds small arrays up one by one",
)
def test_xla_adds_small_arrays_in_blocks(shape=(64, 20, 2, 3), axes=(0, 1, 3)):
    x = arrays(shape)[0] ** 2
    assert x.size < SMALL
    found = jax.jit(lambda x: jnp.sum(x, axes, keepdims=True))(x)
    truth = np.asarray(x, np.float64).sum(axes, keepdims=True)
    np.testing.assert_allclose(found, truth, rtol=6 * 2.0**-24)


RANK_SEVEN = """
import jax, jax.numpy as jnp
x = jnp.ones((3, 1, 2, 2, 8, 8, 8))
print(jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(x, x).sum())
"""


@on_a_cpu
@pytest.mark.xfail(
    (0, 10, 2) <= jax.__version_info__ <= (0, 11, 0),
    strict=True,
    reason="jaxlib crashes in fused products and reductions of rank 7 with an axis of length 1",
)
def test_xla_reduces_rank_seven():
    """In a process of its own, which may crash (jax-ml/jax#40412).

    Joining axes, before or after the product, does not help. No sum of ours was seen to crash:
    test_state.py, `test_arrays_of_rank_seven`.
    """
    run = subprocess.run([sys.executable, "-c", RANK_SEVEN], capture_output=True, text=True)
    assert run.stdout.strip() == "6144.0", run.stderr
