"""Every choice of a configuration arrives in the network that is built from it."""

import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import bn_jax as bn
from bn_jax.train import settings
from bn_jax.train.build import build_average, build_model
from bn_jax.train.config import TrainConfig

SOURCE = inspect.getsource(settings)
SMALL = {"hidden": (3,), "filters": 2, "blocks": 1}


def kernel_shapes(network, images):
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
    flat = flatten_dict(shapes["params"])
    return sorted(leaf.shape for path, leaf in flat.items() if path[-1] == "kernel")


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("ema", bn.Ema(0.7)),
        ("debiased", bn.DebiasedEma(0.7)),
        ("cumulative", bn.CumulativeAverage()),
    ],
)
def test_the_moving_average(average, expected, fill, images):
    config = TrainConfig(average=average, decay=0.7, **SMALL)
    assert build_average(config) == expected
    network = build_model(config, "batch")
    variables = fill(network, images)
    old = variables["batch_stats"]["NormalizedLayer_0"]["BatchNorm_0"]
    old["count"] = jnp.full(3, 2)
    _, updates = network.apply(variables, images, train=True, mutable=["batch_stats"])
    x = images.reshape(8, -1) @ variables["params"]["NormalizedLayer_0"]["Dense_0"]["kernel"]
    new = bn.advance(bn.BatchNormState(**old), bn.measure(x), expected, unbiased=True)
    got = updates["batch_stats"]["NormalizedLayer_0"]["BatchNorm_0"]
    for name, value in new._asdict().items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5)


@pytest.mark.parametrize("model", ["mlp", "cnn", "tower"])
def test_an_enormous_epsilon_makes_all_images_alike(model, fill, images):
    network = build_model(TrainConfig(model=model, epsilon=1e30, **SMALL), "batch")
    variables = fill(network, images)
    train = jax.jit(lambda: network.apply(variables, images, train=True, mutable=["batch_stats"]))
    logits = train()[0]
    np.testing.assert_allclose(logits, logits[:1].repeat(8, 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "function"),
    [("sigmoid", jax.nn.sigmoid), ("relu", jax.nn.relu), ("tanh", jnp.tanh)],
)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_activation(model, name, function, fill, images):
    network = build_model(TrainConfig(model=model, activation=name, **SMALL), "none")
    _, seen = network.apply(
        fill(network, images), images, train=False, capture_intermediates=True, mutable=True
    )
    for layer in (v for k, v in seen["intermediates"].items() if k.startswith("Normalized")):
        (linear,) = (layer[part]["__call__"] for part in layer if part != "__call__")
        np.testing.assert_allclose(layer["__call__"][0], function(linear[0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "init_std", "spread"),
    [
        ("mlp", None, float(re.search(r"(0\.\d+) for the mlp", SOURCE)[1])),
        ("mlp", 0.5, 0.5),
        ("cnn", None, np.sqrt(2 / 400)),
        ("cnn", 0.5, 0.5),
        ("tower", None, np.sqrt(2 / 400)),
        ("tower", 0.5, 0.5),
    ],
)
def test_the_spread_of_initial_weights(model, init_std, spread):
    network = build_model(TrainConfig(model=model, init_std=init_std, **SMALL), "batch")
    kernel = network.kernel_init(jax.random.key(0), (400, 100), jnp.float32)
    # Of n draws, the sample's mean deviates by σ/√n and its spread by σ/√2n.
    assert abs(np.mean(kernel)) < 5 * spread / 200
    assert np.std(kernel) == pytest.approx(spread, abs=5 * spread / np.sqrt(80_000))
    # Gaussian: not truncated, and not uniform.
    assert np.mean(np.abs(kernel) > 3 * spread) == pytest.approx(0.0027, abs=5 * 0.0027**0.5 / 200)


@pytest.mark.parametrize("arm", ["batch", "none"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "tower"])
def test_all_layers_start_from_the_same_initializer(model, arm, images):
    network = build_model(TrainConfig(model=model, **SMALL), arm)
    marked = network.clone(kernel_init=nn.initializers.constant(7.0))
    params = marked.init(jax.random.key(0), images, train=False)["params"]
    for path, leaf in flatten_dict(params).items():
        assert np.all(leaf == {"kernel": 7, "scale": 1, "bias": 0}[path[-1]])


def test_sizes(images):
    def shapes(**options):
        return kernel_shapes(build_model(TrainConfig(**options), "batch"), images)

    assert shapes(hidden=(7,)) == [(7, 10), (784, 7)]
    assert shapes(hidden=()) == [(784, 10)]
    assert shapes() == [(100, 10), (100, 100), (100, 100), (784, 100)]
    # One convolution before the blocks, two in each, and the policy head's two kernels.
    blocks = 2 * 3 * [(3, 3, 5, 5)]
    tower = [(1, 1, 5, 2), (3, 3, 1, 5), *blocks, (1568, 10)]
    assert shapes(model="tower", blocks=3, filters=5) == tower
    assert shapes(model="cnn", filters=5) == [(3, 3, 1, 5), (3, 3, 5, 10), (128, 10), (490, 128)]
