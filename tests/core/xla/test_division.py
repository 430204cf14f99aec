"""Quotients are rounded once, on every platform: lowered for GPUs by way of double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, PartitionSpec

import bn_jax as bn
from bn_jax.core.xla.division import divide, in_double
from tests.core.draws import laws
from tests.devices import make_mesh

pytestmark = pytest.mark.optimized

normal = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False).map(np.float32)


def on_a_gpu(part, whole):
    """What is computed there, computed here."""
    return in_double(part, whole.astype(part.dtype), alone=True)[0]


DIVIDE = {"jit": jax.jit(divide), "op by op": divide, "on a GPU": on_a_gpu}


@pytest.mark.parametrize("how", DIVIDE)
@laws
@given(part=normal, whole=st.integers(1, 2**24).map(np.float32))
def test_the_nearest_number(how, part, whole):
    if 0 < abs(part) < 2.0**-60:  # the divide itself would be subnormal
        part = np.float32(0)
    wanted = np.float32(np.float64(part) / np.float64(whole))
    assert DIVIDE[how](jnp.asarray(part), jnp.asarray(whole)) == wanted


@pytest.mark.parametrize("how", DIVIDE)
def test_m_times_d_over_m_is_d(how):
    """What makes a constant feature come out as β."""
    m = jnp.arange(1.0, 4000.0)
    np.testing.assert_array_equal(DIVIDE[how](7 * m, m), np.full(m.size, 7, np.float32))


def test_complex_parts_are_divided_alike():
    part = jnp.array([3 + 7j, -1e20 + 1j, 0], jnp.complex64)
    for run in DIVIDE.values():
        found = run(part, jnp.full(3, 3, jnp.complex64))
        np.testing.assert_allclose(found, np.asarray(part, complex) / 3, rtol=2.0**-24)
        assert found.dtype == np.complex64


def test_derivatives_and_batches():
    part, whole = jnp.array([1.0, -3.0]), jnp.array([7.0, 0.3])
    slopes = jax.jvp(divide, (part, whole), (jnp.ones(2), jnp.ones(2)))[1]
    np.testing.assert_allclose(slopes, 1 / whole - part / whole**2, rtol=1e-6)
    back = jax.vjp(divide, part, whole)[1](jnp.ones(2))
    np.testing.assert_allclose(back, [1 / whole, -part / whole**2], rtol=1e-6)
    for dims in ((0, None), (None, 0), (0, 0)):
        args = [a if dim == 0 else a[0] for a, dim in zip((part, whole), dims, strict=True)]
        wanted = np.divide(*args)
        np.testing.assert_allclose(jax.vmap(divide, dims)(*args), wanted, rtol=1e-7)


def lowered(platform, shape=(37, 16), **options):
    """A training step as it is given to a platform's compiler."""
    params, state = bn.init(shape[-1])
    step = jax.jit(lambda x: bn.batch_norm(x, params, state, train=True, **options))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return export.export(step, platforms=[platform])(x).mlir_module()


def barriers(text):
    """How many there are that no kernel crosses."""
    return text.count("stablehlo.optimization_barrier")


@pytest.mark.parametrize(
    "options",
    [{}, {"where": np.ones((37, 1), np.float32)}],
)
def test_gpus_divide_in_double_and_make_one_origin(options):
    """Else a constant feature is off, and y by 10⁻³ at a mean of 10⁴ standard deviations.

    Seen on an H100: a sum of few values is made anew in each kernel that uses it, in other orders.
    """
    on_cpu = lowered("cpu", **options)
    assert "f64" not in on_cpu
    for platform in "cuda", "rocm":
        on_gpu = lowered(platform, **options)
        assert "xf64>" in on_gpu
        assert barriers(on_gpu) >= 1


def test_members_agree_on_one_origin_too():
    """Of vmap, whose collectives are sums like all others."""
    params, state = bn.init(16)
    member = functools.partial(bn.batch_norm, params=params, state=state, train=True, axis_name="i")
    step = jax.jit(jax.vmap(lambda x: member(x), axis_name="i"))
    x = jax.ShapeDtypeStruct((4, 37, 16), jnp.float32)
    text = export.export(step, platforms=["cuda"])(x).mlir_module()
    assert barriers(text) == 1


def test_parts_and_wholes_may_differ_over_other_devices():
    """One set of values is on all devices, another spread over them, and counted by weights."""
    mesh = make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    random = np.random.default_rng(0)
    x, z, where = (jnp.asarray(random.random((n, 1)), jnp.float32) for n in (8, 32, 32))

    def member(x, z, where):
        moments = bn.merge(bn.measure(x), bn.measure(z, where=where))
        return (moments.mean + moments.var)[None]

    specs = PartitionSpec(), PartitionSpec("a"), PartitionSpec("a")
    sharded = jax.shard_map(member, mesh=mesh, in_specs=specs, out_specs=specs[1])
    split = lambda a: a.reshape(4, 8, 1)  # noqa: E731
    mapped = lambda *args: jax.vmap(member, (None, 0, 0))(args[0], *map(split, args[1:]))  # noqa: E731
    found, wanted = (
        jax.jit(jax.grad(lambda *args, f=f: (f(*args) ** 2).sum(), (0, 1, 2)))(x, z, where)
        for f in (sharded, mapped)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
