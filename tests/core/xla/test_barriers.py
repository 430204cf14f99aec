"""Barriers: half precision rounded once, statistics saved by name, and canaries for both."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.jet import jet

import bn_jax as bn
from bn_jax.core.xla.barriers import downcast, rounded

pytestmark = pytest.mark.optimized

# All bfloat16s with all kinds of tails: nothing, just above, below, at and beyond the middle.
HEADS = np.arange(2**16, dtype=np.uint32) << 16
TAILS = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
VALUES = (HEADS[:, None] | TAILS).view(np.float32)
QUIET = np.uint32(1 << 22)
"""The bit of NaNs that arithmetic sets in those it returns."""


@pytest.mark.parametrize("run", [lambda f: f, jax.jit, lambda f: jax.jit(jax.vmap(f))])
def test_every_number_is_rounded_to_the_nearest(run):
    numbers = VALUES[~np.isnan(VALUES)]
    found = run(lambda values: downcast(values, jnp.bfloat16))(jnp.asarray(numbers))
    assert found.dtype == jnp.bfloat16
    with np.errstate(all="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))


def test_not_a_number_stays_none():
    broken = VALUES[np.isnan(VALUES)]
    quiet = (broken.view(np.uint32) | QUIET).view(np.float32)
    assert jnp.isnan(jax.jit(lambda values: downcast(values, jnp.bfloat16))(quiet)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.complex64])
def test_other_types_are_converted_or_left(dtype):
    wide = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    values = jnp.asarray([1.0, 1 / 3, -7e4, 1e-7], wide)
    found = jax.jit(lambda values: downcast(values, dtype))(values)
    np.testing.assert_array_equal(found, values.astype(dtype), strict=True)


def test_derivatives_are_those_of_a_conversion():
    x = jnp.asarray([1.0, 1 / 3])

    def cube(x, convert):
        return (convert(x) ** 3).astype(jnp.float32).sum()

    ours, plain = (
        [jax.grad(f)(x), jax.jvp(f, (x,), (x,)), jax.hessian(f)(x), jax.jit(jax.grad(f))(x)]
        for f in (
            lambda x: cube(x, lambda x: downcast(x, jnp.bfloat16)),
            lambda x: cube(x, lambda x: x.astype(jnp.bfloat16)),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_by_bits_on_the_cpu_alone():
    values = jax.ShapeDtypeStruct((3,), jnp.float32)
    traced = jax.jit(lambda values: downcast(values, jnp.bfloat16)).trace(values)
    for platform, count in {"cpu": 1, "cuda": 0, "tpu": 0}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.reduce_precision") == count, platform


@pytest.mark.parametrize(("dtype", "barriers"), [(jnp.bfloat16, 1), (jnp.float32, 0)])
def test_only_half_precision_is_held_and_on_the_cpu_alone(dtype, barriers):
    for platform, count in {"cpu": barriers, "cuda": 0, "tpu": 0}.items():
        traced = jax.jit(rounded).trace(jnp.ones(3, dtype))
        hlo = traced.lower(lowering_platforms=(platform,)).as_text()
        assert hlo.count("stablehlo.optimization_barrier") == count, platform


def sums_and_collectives(policy):
    """How many sums and collectives the gradient of a rematerialized block computes."""
    params, state = bn.init(8)

    def block(x):
        return jnp.tanh(bn.batch_norm(jnp.sin(x), params, state, train=True, axis_name="i")[0])

    def loss(x):
        return jnp.sum(jax.checkpoint(block, policy=policy)(x) ** 2)

    gradient = jax.vmap(jax.grad(loss), axis_name="i")
    text = str(jax.make_jaxpr(gradient)(jnp.ones((2, 16, 8))))
    return text.count("power_sums["), text.count("part_mean")


def test_a_policy_saves_the_statistics():
    """Without it, the backward pass repeats the sums and the origin of the forward pass."""
    assert sums_and_collectives(bn.save_statistics) == (2, 1)
    assert sums_and_collectives(None) == (3, 2)


def test_a_policy_saves_collectives(members=4):
    """In the program that is compiled: each all-reduce moves the sums of one direction."""
    mesh = jax.make_mesh((members,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    params, state = bn.init(8)

    def block(x):
        return jnp.tanh(bn.batch_norm(jnp.sin(x), params, state, train=True, axis_name="i")[0])

    def collectives(policy):
        local = jax.grad(lambda x: jnp.sum(jax.checkpoint(block, policy=policy)(x) ** 2))
        spec = jax.sharding.PartitionSpec("i")
        run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
        return len(re.findall(r"stablehlo.all_reduce", run.lower(jnp.ones((8, 8))).as_text()))

    assert collectives(bn.save_statistics) < collectives(None)


# Canaries: plain JAX. When one of these passes, the workaround that names it may go.


@pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__ < (0, 10),
    reason="is about XLA's CPU compiler since jaxlib 0.10",
)
@pytest.mark.xfail(strict=True, reason="XLA keeps the wide value of bfloat16")
def test_xla_keeps_half_precision(shape=(64, 1024)):
    """What the second step needs of the first is kept between them, and should be bfloat16."""

    def run(x, w):
        half = jnp.tanh(x @ w).astype(jnp.bfloat16)
        mean = jnp.mean(half.astype(jnp.float32), 0, keepdims=True)
        return half, half.astype(jnp.float32) - mean

    x, w = jnp.ones(shape), jnp.ones((shape[1], shape[1]))
    hlo = jax.jit(run).lower(x, w).compile().as_text()
    entry = hlo[hlo.index("\nENTRY") :]
    kept = re.findall(rf"= \(?(\w+)\[{shape[0]},{shape[1]}\]\S* fusion\(", entry)
    assert "f32" not in kept[:-1]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="is about XLA's GPU compiler")
@pytest.mark.xfail(strict=True, reason="XLA's GPU compiler computes small sums again")
def test_xla_sums_once(shape=(37, 16)):
    """The constant of each column is summed, averaged and taken off: nothing may be left."""
    x = jnp.broadcast_to(jnp.linspace(1, 2, shape[1]), shape)
    run = jax.jit(lambda x: (x - jnp.mean(x, 0, keepdims=True), jnp.mean(x, 0, keepdims=True)))
    off, mean = run(x)
    np.testing.assert_array_equal(off, x - mean)


@pytest.mark.xfail(strict=True, reason="jet has no rule for names", raises=KeyError)
def test_jet_knows_names():
    jet(functools.partial(checkpoint_name, name="a"), (1.0,), ((1.0,),))
