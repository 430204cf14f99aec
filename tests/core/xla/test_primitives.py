"""Operations: under every transformation what their plain functions are, and without them too."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.jet import jet

import bn_jax as bn
from bn_jax.core.xla.barriers import rounded
from bn_jax.core.xla.division import divide


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(2, 5, (8, 3)), jnp.float32)


def test_jet_goes_through_inference(x):
    params, state = bn.init(3)
    f = lambda x: bn.batch_norm(x, params, state, train=False)[0]  # noqa: E731
    np.testing.assert_allclose(jet(f, (x,), ((x,),))[1][0], f(x), rtol=1e-6)


def test_vmap_may_batch_any_operand_along_any_axis(x):
    part, whole = x, jnp.abs(x) + 1
    for axes in ((0, 1), (1, None), (None, 0)):
        rows = [
            np.moveaxis(a, axis, 0) if axis is not None else np.stack([a[0]] * 3)
            for a, axis in zip((part[:3], whole[:3]), axes, strict=True)
        ]
        given = [
            a if axis is not None else a[0]
            for a, axis in zip((part[:3], whole[:3]), axes, strict=True)
        ]
        found = jax.vmap(divide, axes)(*given)
        np.testing.assert_allclose(found, rows[0] / rows[1], rtol=1e-6)


WITHOUT_INTERNALS = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jax.extend.core
del jax.extend.core.Primitive        # as a later JAX may

import bn_jax as bn

params, state = bn.init(3)
x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (64, 3)), jnp.float32)
for options in ({}, {"where": np.arange(64) % 2}, {"group_size": 16}):
    def loss(x, params):
        y, new = bn.batch_norm(x, params, state, train=True, **options)
        return jnp.sum(jnp.sin(y)), (y, new)
    (_, (y, new)), dx = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, params)
    np.save(sys.stdout.buffer, np.concatenate([y, dx, new.var[None]]))
"""


def test_without_the_internals_of_jax_values_are_the_same():
    run = subprocess.run([sys.executable, "-c", WITHOUT_INTERNALS], capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    import io

    found = io.BytesIO(run.stdout)
    params, state = bn.init(3)
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (64, 3)), jnp.float32)
    for options in ({}, {"where": np.arange(64) % 2}, {"group_size": 16}):

        def loss(x, options=options):
            y, new = bn.batch_norm(x, params, state, train=True, **options)
            return jnp.sum(jnp.sin(y)), (y, new)

        (_, (y, new)), dx = jax.value_and_grad(loss, has_aux=True)(x)
        expected = np.concatenate([y, dx, new.var[None]])
        np.testing.assert_allclose(np.load(found), expected, rtol=1e-5, atol=1e-5)


def residuals(f, x):
    """The sizes of what a function keeps for its backward pass."""
    kept = jax.eval_shape(lambda x: jax.vjp(f, x)[1], x)
    return sorted(leaf.size for leaf in jax.tree.leaves(kept))


def test_ours_keeps_x_alone(shape=(64, 32)):
    x = jnp.zeros(shape, jnp.bfloat16)
    params, state = bn.init(shape[-1])
    kept = residuals(lambda x: bn.batch_norm(x, params, state, train=True)[0], x)
    assert sum(size == x.size for size in kept) == 1


@pytest.mark.xfail(strict=True, reason="JAX keeps x - origin in float32, not x")
def test_jax_keeps_x_alone(shape=(64, 32)):
    """Canary. When it passes, plain functions will do, and primitives.py may go."""

    def square_of_distance(x, origin):
        d = x.astype(jnp.float32) - origin
        return jnp.sum(d * d, 0)

    x = jnp.zeros(shape, jnp.bfloat16)
    kept = jax.eval_shape(
        lambda x: jax.vjp(lambda x: square_of_distance(x, jnp.ones((1, 32))), x)[1], x
    )
    large = [leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.size == x.size]
    assert large == [jnp.bfloat16]


@pytest.mark.xfail(strict=True, reason="jet has no rule for custom_jvp", raises=Exception)
def test_jet_knows_custom_jvp(x):
    """Canary. When it passes, jax.custom_jvp can take the place of some operations."""
    jet(jax.jit(jax.nn.relu), (x,), ((x,),))


def test_what_is_rounded_is_the_same_under_every_transformation():
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)

    def cube(x):
        return rounded(x) * rounded(x) * x

    for run in (cube, jax.jit(cube), jax.vmap(cube)):
        np.testing.assert_array_equal(run(x), x * x * x)
    np.testing.assert_array_equal(jax.jvp(cube, (x,), (x,))[1], 3 * x * x * x)
    np.testing.assert_array_equal(jax.grad(lambda x: cube(x).sum())(x), 3 * x * x)
    assert jax.grad(jax.grad(cube))(jnp.bfloat16(2)) == 12
