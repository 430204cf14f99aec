"""Training on one value per feature: refused where values are computed, never for shapes alone."""

import jax
import jax.numpy as jnp
import pytest

import bn_jax as bn
from bn_jax.core.xla.notice import on_single_value
from tests.devices import make_mesh

PARAMS, STATE = bn.init(3)
X = jnp.ones((1, 3))


def train(x, params=PARAMS):
    return bn.batch_norm(x, params, STATE, train=True)


def loss(x, params=PARAMS):
    return train(x, params)[0].sum()


def in_shard_map(x):
    mesh = make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    map_ = jax.shard_map(lambda x: train(x)[0], mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    return jax.jit(map_)(x)


COMPUTED = {
    "op by op": train,
    "jit": jax.jit(train),
    "grad": jax.grad(loss),
    "hessian": jax.jit(jax.hessian(loss)),
    "vmap": lambda x: jax.vmap(train)(x[None]),
    "scan": lambda x: jax.lax.scan(lambda carry, x: (carry, loss(x)), 0, x[None]),
    "remat": jax.grad(jax.checkpoint(loss)),
    "shard_map": in_shard_map,
    "lower": lambda x: jax.jit(train).lower(x),
    "export": lambda x: jax.export.export(jax.jit(train))(x),
}


@pytest.mark.parametrize("run", COMPUTED.values(), ids=COMPUTED)
def test_values_are_refused(run):
    with pytest.raises(ValueError, match="more than one value per feature"):
        run(X)


def test_shapes_are_not():
    y, state = jax.eval_shape(jax.jit(train), X)
    assert y.shape == X.shape
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, STATE)
    many = jax.ShapeDtypeStruct((4, 1, 3), jnp.float32)
    assert jax.eval_shape(jax.vmap(jax.grad(loss)), many).shape == many.shape
    jax.make_jaxpr(jax.grad(loss, argnums=1))(X, PARAMS)
    ghost = lambda x: bn.batch_norm(x, PARAMS, STATE, train=True, group_size=2)[0]  # noqa: E731
    assert jax.eval_shape(ghost, jnp.ones((5, 3))).shape == (5, 3)


def test_inference_takes_one():
    y, _ = bn.batch_norm(X, PARAMS, STATE, train=False)
    assert y.shape == X.shape


def test_a_notice_ends_with_its_context():
    params, state = bn.init(3)
    said = []
    with on_single_value(said.append):
        bn.batch_norm(jnp.ones((1, 3)), params, state, train=True)
    assert len(said) == 1
    with pytest.raises(ValueError, match="more than one value"):
        bn.batch_norm(jnp.ones((1, 3)), params, state, train=True)
