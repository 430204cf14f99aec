"""Y in half precision: rounded as numbers are, and of no cost to make again."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bn_jax.core.rounded import rounded

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
    found = run(lambda values: rounded(values, jnp.bfloat16))(jnp.asarray(numbers))
    assert found.dtype == jnp.bfloat16
    with np.errstate(all="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))


def test_not_a_number_stays_none():
    broken = VALUES[np.isnan(VALUES)]
    quiet = (broken.view(np.uint32) | QUIET).view(np.float32)
    assert jnp.isnan(jax.jit(lambda values: rounded(values, jnp.bfloat16))(quiet)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.complex64])
def test_other_types_are_converted_or_left(dtype):
    wide = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    values = jnp.asarray([1.0, 1 / 3, -7e4, 1e-7], wide)
    found = jax.jit(lambda values: rounded(values, dtype))(values)
    np.testing.assert_array_equal(found, values.astype(dtype), strict=True)


def test_derivatives_are_those_of_a_conversion():
    x = jnp.asarray([1.0, 1 / 3])

    def cube(x, convert):
        return (convert(x) ** 3).astype(jnp.float32).sum()

    ours, plain = (
        [jax.grad(f)(x), jax.jvp(f, (x,), (x,)), jax.hessian(f)(x), jax.jit(jax.grad(f))(x)]
        for f in (
            lambda x: cube(x, lambda x: rounded(x, jnp.bfloat16)),
            lambda x: cube(x, lambda x: x.astype(jnp.bfloat16)),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_by_bits_on_the_cpu_alone():
    values = jax.ShapeDtypeStruct((3,), jnp.float32)
    traced = jax.jit(lambda values: rounded(values, jnp.bfloat16)).trace(values)
    for platform, count in {"cpu": 1, "cuda": 0, "tpu": 0}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.reduce_precision") == count, platform
