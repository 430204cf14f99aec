"""Ghost batch norm: each group by itself, the memory by all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bn_jax as bn
from bn_jax.bench.scaling import collectives
from tests.core.draws import batches, few
from tests.devices import make_mesh

PARAMS = bn.BatchNormParams(jnp.array([2.0, -1.0, 0.5]), jnp.array([0.0, 1.0, 3.0]))
_, STATE = bn.init(3)
STATIC = ("train", "average", "feature_axis", "unbiased", "group_size")
batch_norm = jax.jit(bn.batch_norm, static_argnames=STATIC)
train = partial(batch_norm, params=PARAMS, state=STATE, train=True)
X = np.random.default_rng(0).standard_normal((10, 4, 3)).astype(np.float32) * 2 + 5
WHERES = {
    "all": None,
    "mask": np.random.default_rng(1).random((10, 4)) < 0.7,
    "weights": np.random.default_rng(2).uniform(0, 3, (10, 4)).astype(np.float32),
}


@partial(jax.jit, static_argnums=1)
def one_by_one(x, group_size, where=None):
    """Y of each group, by calls of their own."""
    rows = [slice(first, first + group_size) for first in range(0, len(x), group_size)]
    return jnp.concatenate(
        [train(x[part], where=None if where is None else where[part])[0] for part in rows]
    )


@pytest.mark.parametrize("group_size", [1, 3, 5, 64])
@pytest.mark.parametrize("kind", WHERES)
def test_each_group_is_normalized_alone_and_all_are_remembered(kind, group_size):
    """Also where groups do not divide the batch: what is left over is a last, smaller group."""
    where = WHERES[kind]
    y, state = train(X, group_size=group_size, where=where)
    np.testing.assert_allclose(y, one_by_one(X, group_size, where), atol=3e-6)
    _, whole = train(X, where=where)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state, whole)


@pytest.mark.parametrize("group_size", [4, 5])
def test_gradients_are_those_of_the_groups(group_size):
    dy = np.random.default_rng(3).standard_normal(X.shape).astype(np.float32)

    def loss(run):
        return lambda x, params: jnp.tanh(run(x, params) * dy).sum()

    def alone(x, params):
        parts = [x[first : first + group_size] for first in range(0, len(x), group_size)]
        return jnp.concatenate([bn.batch_norm(p, params, STATE, train=True)[0] for p in parts])

    def ghost(x, params):
        return bn.batch_norm(x, params, STATE, train=True, group_size=group_size)[0]

    expected = jax.jit(jax.grad(loss(alone), (0, 1)))(X, PARAMS)
    actual = jax.jit(jax.grad(loss(ghost), (0, 1)))(X, PARAMS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)


@few
@given(batches((12, 3)), st.sampled_from([2, 3, 4, 5, 6, 8]))
def test_the_memory_does_not_depend_on_the_groups(x, group_size):
    remember = partial(train, average=bn.Ema(0), unbiased=False)
    if 12 % group_size == 1:
        group_size += 1
    _, ghost = remember(x, group_size=group_size)
    _, whole = remember(x)
    std = np.sqrt(np.asarray(whole.var, np.float64))
    ulp = np.spacing(np.float32(np.abs(x).max()))
    np.testing.assert_allclose(ghost.mean, whole.mean, rtol=0, atol=2 * ulp)
    assert (np.abs(np.float64(ghost.var) - whole.var) <= 1e-6 * std**2 + ulp**2).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_groups_are_of_the_leading_batch_axis(axis):
    """Whichever axis the features are: the leading one of the others."""
    moved = np.moveaxis(X, -1, axis)
    y, state = train(moved, feature_axis=axis, group_size=4)
    expected, remembered = train(X, group_size=4)
    np.testing.assert_allclose(np.moveaxis(y, axis, -1), expected, atol=2e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state, remembered)


def test_several_feature_axes():
    params, state = bn.init((4, 3))
    y, new = batch_norm(X, params, state, train=True, feature_axis=(1, 2), group_size=5)
    flat, flat_new = batch_norm(X.reshape(10, 12), *bn.init(12), train=True, group_size=5)
    np.testing.assert_allclose(y.reshape(10, 12), flat, atol=1e-6)
    np.testing.assert_allclose(new.var.reshape(12), flat_new.var, rtol=1e-6)


def test_many_axes():
    """The groups' axis comes before axes are joined (jax-ml/jax#40412)."""
    x = X.reshape(10, 2, 1, 2, 1, 3)
    np.testing.assert_allclose(
        train(x, group_size=5)[0].reshape(X.shape), train(X, group_size=5)[0], atol=2e-6
    )


def test_one_bad_group_spoils_its_own_output_alone():
    x = X.copy()
    x[0, 0, 1] = np.nan
    y, state = train(x, group_size=5)
    np.testing.assert_allclose(y[5:], train(X, group_size=5)[0][5:], atol=2e-6)
    assert np.isnan(y[:5, :, 1]).all()
    np.testing.assert_array_equal(state.count, [1, 0, 1])
    np.testing.assert_array_equal(state.mean[1], STATE.mean[1])


def test_inference_does_not_know_of_groups():
    infer = partial(bn.batch_norm, X, PARAMS, STATE, train=False)
    np.testing.assert_array_equal(infer(group_size=3)[0], infer()[0])


@pytest.mark.parametrize(
    ("group_size", "error", "message"),
    [
        (0, ValueError, "group_size=0 must be positive"),
        (-4, ValueError, "group_size=-4 must be positive"),
        (2.5, TypeError, "group_size"),
        (3, ValueError, "group_size=3 leaves a group of one"),
        (1, ValueError, "group_size=1 leaves a group of one"),
    ],
)
def test_errors(group_size, error, message):
    # In tests, shapes and types in signatures are checked before we come to it.
    with pytest.raises(error, match=message):
        train(X[:, 0], group_size=group_size)


def test_a_traced_size_is_an_error():
    with pytest.raises(TypeError, match="group_size"):
        jax.jit(lambda x, size: bn.batch_norm(x, PARAMS, STATE, train=True, group_size=size))(X, 5)


# On many devices.


def communication(function, *args):
    """The collectives that a function compiles to, over 8 devices."""
    return collectives(jax.jit(function).lower(*args).compile().as_text(), 8)


def spread(kind, shape=(64, 3, 3, 3)):
    mesh = make_mesh((8,), ("d",), axis_types=(kind,))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return mesh, jax.device_put(x, NamedSharding(mesh, P("d")))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("group_size", [4, 8])
def test_no_communication_where_groups_lie_within_shards(kind, group_size):
    """Neither forward nor backward; to remember one state of all takes the pool's two sums."""
    mesh, x = spread(kind)

    def step(x, dy):
        y, pull = jax.vjp(lambda x: train(x, group_size=group_size)[0], x)
        return y, pull(dy)

    with jax.set_mesh(mesh):
        assert communication(step, x, x) == []
        pooled = communication(lambda x: train(x, group_size=group_size)[1], x)
        # Of 3 features, C + 2C floats; with jax 0.8.2 also the counts, which are constants.
        assert sorted(size for _, size in pooled) in ([12, 24], [24, 36])
        y, _ = jax.jit(lambda x: train(x, group_size=group_size))(x)
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
    np.testing.assert_allclose(y, one_by_one(np.asarray(x), group_size), atol=2e-6)


def test_groups_that_span_shards_of_an_auto_mesh():
    """JAX moves what it must."""
    mesh, x = spread(AxisType.Auto)
    with jax.set_mesh(mesh):
        y, _ = jax.jit(lambda x: train(x, group_size=16))(x)
    np.testing.assert_allclose(y, one_by_one(np.asarray(x), 16), atol=2e-6)


def test_groups_that_span_shards_of_an_explicit_mesh():
    mesh, x = spread(AxisType.Explicit)
    with jax.set_mesh(mesh):
        for group_size in 3, 16:
            with pytest.raises(ValueError, match=f"group_size={group_size} spans shards of 8"):
                train(x, group_size=group_size)
        whole, _ = train(x, group_size=64)
    np.testing.assert_allclose(whole, train(np.asarray(x))[0], atol=2e-6)
