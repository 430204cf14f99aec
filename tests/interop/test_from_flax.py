"""Flax's variables: what they mean to us, and that Flax agrees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax as bn
from bn_jax.interop.flax import from_flax, to_flax
from bn_jax.layers.linen import BatchNorm
from tests.interop.follow import FEATURES, assert_close, assert_same, batches, follow, targets


def trained(**arguments):
    """A linen layer in a model, after some steps, and what evaluates and trains it."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, name="bn", **arguments)(x)

    def loss(params, rest, x, target):
        y, rest = Model().apply({"params": params, **rest}, x, True, mutable=["batch_stats"])
        return jnp.mean((y - target) ** 2), rest

    xs = batches(5)
    variables = Model().init(jax.random.key(0), xs[0], True)
    params, rest = variables.get("params", {}), {"batch_stats": variables["batch_stats"]}
    for x, target in zip(xs, targets(xs), strict=True):
        gradients, rest = jax.grad(loss, has_aux=True)(params, rest, x, target)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    return Model(), ({"params": params} if params else {}) | rest


@pytest.mark.parametrize("arguments", [
    {}, {"momentum": 0.5, "epsilon": 1e-2}, {"use_scale": False}, {"use_bias": False},
    {"use_scale": False, "use_bias": False},
])  # fmt: skip
def test_ours_goes_on_where_linen_is_and_back(lenient, arguments):
    model, variables = trained(**arguments)
    words = {key: value for key, value in arguments.items() if not key.startswith("use")}
    converted = from_flax(variables, "bn", **words)
    back, made = to_flax(*converted, "bn")
    jax.tree.map(assert_same, back, variables)
    assert made == {
        "momentum": 0.99, "epsilon": 1e-5, "use_scale": True, "use_bias": True, **arguments,
    }  # fmt: skip
    now = [variables]

    def train(x):
        y, new = model.apply(now[0], x, True, mutable=["batch_stats"])
        now[0] = now[0] | new
        return y

    def read():
        return [now[0]["batch_stats"]["bn"][key] for key in ("mean", "var")]

    evaluate = lambda x: model.apply(now[0], x, False)  # noqa: E731
    follow(converted, evaluate, train, batches(4, seed=5), read=read)


@pytest.mark.parametrize("path", ["layers/0", ("layers", 0)])
@pytest.mark.parametrize("pure", [True, False])
def test_an_nnx_state(lenient, path, pure):
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.BatchNorm(FEATURES, momentum=0.9, rngs=nnx.Rngs(0))])

    model = Model()
    layer = model.layers[0]
    for x in batches(3):
        layer(x)
    state = nnx.state(model)
    converted = from_flax(nnx.to_pure_dict(state) if pure else state, path, momentum=0.9)
    assert_same(converted[1].var, layer.var[...])

    back, made = to_flax(*converted)
    twin = nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(1), **made)
    nnx.update(twin, back["params"] | back["batch_stats"])
    for each in (layer, twin):
        follow(
            converted, lambda x, each=each: each(x, use_running_average=True), each,
            batches(3, seed=5), read=lambda each=each: (each.mean[...], each.var[...]),
        )  # fmt: skip


def test_settings_make_our_layers_too():
    """A core state in our linen layer by its settings, and on from there."""
    x = jnp.asarray(batches(1)[0])
    params, state = bn.init(FEATURES)
    settings = {"average": bn.DebiasedEma(0.9), "epsilon": 1e-3, "unbiased": True}
    _, state = bn.batch_norm(x, params, state, train=True, **settings)
    variables, _ = to_flax(params, state, settings, count=True)
    layer = BatchNorm(**settings)
    for _ in range(2):
        expected, state = bn.batch_norm(x, params, state, train=True, **settings)
        y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables |= new
        assert_same(y, expected)
    back = from_flax(variables)
    jax.tree.map(assert_same, back[:2], (params, state))
    assert from_flax(variables, count=9)[1].count.tolist() == [9] * FEATURES


def test_our_layers_count_in_floats():
    layer = BatchNorm(average=bn.CumulativeAverage())
    variables = layer.init(jax.random.key(0), jnp.ones((2, FEATURES)), True)
    assert from_flax(variables)[1].count.tolist() == [0] * FEATURES
    variables["batch_stats"]["count"] += 3
    count = from_flax(variables)[1].count
    assert count.tolist() == [3] * FEATURES
    assert count.dtype == np.int32


def test_several_feature_axes_stay():
    variables = {"batch_stats": {"mean": np.zeros((2, 3), np.float32), "var": np.ones((2, 3))}}
    _, state, _ = from_flax(variables)
    assert state.count.shape == (2, 3)
    assert_close(state.var, np.ones((2, 3)))


def test_values_that_flax_has_boxed():
    box = nn.Partitioned(jnp.full(2, 3.0), names=("features",))
    variables = {"params": {"scale": box}, "batch_stats": {"mean": box, "var": np.ones(2)}}
    params, state, _ = from_flax(variables)
    assert params.scale.tolist() == state.mean.tolist() == [3, 3]


def test_m_changes_the_convention():
    variables = {"batch_stats": {"mean": np.zeros(2), "var": np.ones(2)}}
    params, state, settings = from_flax(variables, values_per_feature=4)
    assert settings["unbiased"]
    np.testing.assert_allclose(state.var, 4 / 3, rtol=1e-6)
    back, _ = to_flax(params, state, settings, values_per_feature=4)
    np.testing.assert_allclose(back["batch_stats"]["var"], 1, rtol=1e-6)
