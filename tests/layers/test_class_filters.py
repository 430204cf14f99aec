"""Code that looks for flax's class finds ours: isinstance, filters of nnx, set_attributes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bn_jax.layers.linen
from bn_jax.layers.nnx import BatchNorm


@pytest.fixture
def model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), BatchNorm(4, rngs=rngs))


def test_isinstance(model):
    assert isinstance(model.layers[1], nnx.BatchNorm)
    assert isinstance(bn_jax.layers.linen.BatchNorm(), nn.BatchNorm)


def test_set_attributes(model):
    model.set_attributes(nnx.BatchNorm, momentum=0.5, use_running_average=True)
    assert model.layers[1].momentum == 0.5
    model.layers[1].mean[...] = jnp.ones(4)
    x = jax.random.normal(jax.random.key(1), (8, 3))
    model(x)
    assert (model.layers[1].mean[...] == 1).all()  # evaluation


def test_iter_modules(model):
    found = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    assert found == [model.layers[1]]


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this flax has no nnx.view")
def test_view(model):
    view = nnx.view(model, only=nnx.BatchNorm, use_running_average=True)
    assert view.layers[1].use_running_average
    assert not model.layers[1].use_running_average


@pytest.mark.skipif(not hasattr(nnx, "view_info"), reason="this flax has no nnx.view_info")
def test_view_info(model):
    assert "use_running_average" in nnx.view_info(model, only=nnx.BatchNorm)


def test_a_linen_interceptor_finds_it():
    seen = []

    def look(call, args, kwargs, context):
        seen.append(isinstance(context.module, nn.BatchNorm))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        bn_jax.layers.linen.BatchNorm().init(jax.random.key(0), jnp.ones((2, 3)), True)
    assert all(seen)
    assert seen
