"""Whole models with one import changed: the same variables, logits and training, both ways.

Built as flax's published examples are: a bottleneck ResNet whose normalization is a partial of
BatchNorm (linen), and a convolutional net that makes its own (nnx). test_flax_examples.py has those
themselves, which takes minutes.
"""

from functools import partial

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bn_jax.layers.linen
import bn_jax.layers.nnx
from tests.layers.draws import normal

pytestmark = pytest.mark.usefixtures("lenient")
IMAGES = normal((8, 16, 16, 3), 0.5)
LABELS = jnp.asarray(np.arange(8) % 5)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1, the last normalization starting at zero; a projection where shapes change."""

    filters: int
    norm: type
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        y = nn.relu(self.norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    batch_norm: type

    @nn.compact
    def __call__(self, x, train=True):
        norm = partial(
            self.batch_norm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            axis_name=None,
        )
        x = nn.Conv(8, (7, 7), (2, 2), use_bias=False, name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        for n, strides in enumerate([(1, 1), (2, 2)]):
            x = Bottleneck(4 * 2**n, norm, strides)(x)
        return nn.Dense(5)(x.mean((1, 2)))


@partial(jax.jit, static_argnums=0)
def train_step(model, variables):
    """One step of gradient descent; the loss comes with the new variables."""

    def loss_fn(params):
        logits, updates = model.apply(variables | {"params": params}, IMAGES, mutable="batch_stats")
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    step = lambda p, g: p - 0.1 * g  # noqa: E731
    return loss, {"params": jax.tree.map(step, variables["params"], grads), **updates}


def trained(model, steps=3):
    variables = jax.jit(model.init)(jax.random.key(1), IMAGES)
    for _ in range(steps):
        loss, variables = train_step(model, variables)
    return loss, variables


@pytest.fixture(scope="module")
def resnets():
    """Models, losses and variables after the same three steps, of flax's and of ours."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        models = ResNet(nn.BatchNorm), ResNet(bn_jax.layers.linen.BatchNorm)
        yield [(model, *trained(model)) for model in models]


def test_a_resnet_trains_the_same(resnets):
    (_, their_loss, theirs), (_, our_loss, ours) = resnets
    np.testing.assert_allclose(our_loss, their_loss, rtol=1e-4)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("into", ["ours", "flax's"])
def test_a_resnets_checkpoint_is_the_others(into, resnets):
    """By flax's serialization: logits in evaluation within 1e-5, in training too."""
    source, target = resnets if into == "ours" else reversed(resnets)
    data = flax.serialization.to_bytes(source[2])
    like = jax.tree.map(jnp.zeros_like, target[2])
    restored = flax.serialization.from_bytes(like, data)
    for train in False, True:
        apply = lambda model, v: model.apply(v, IMAGES, train, mutable="batch_stats")[0]  # noqa: E731, B023
        expected = apply(source[0], source[2])
        np.testing.assert_allclose(apply(target[0], restored), expected, rtol=1e-5, atol=1e-5)


class CNN(nnx.Module):
    def __init__(self, batch_norm, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = batch_norm(8, rngs=rngs)
        self.dense = nnx.Linear(8 * 8 * 8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.dense(x.reshape(len(x), -1))


def test_a_cnns_state_is_the_others():
    theirs, ours = CNN(nnx.BatchNorm, nnx.Rngs(0)), CNN(bn_jax.layers.nnx.BatchNorm, nnx.Rngs(1))
    np.testing.assert_raises(
        AssertionError, np.testing.assert_allclose, ours(IMAGES), theirs(IMAGES)
    )
    for source, target in [(theirs, ours), (ours, theirs)]:
        source(IMAGES * 2)  # moves the statistics
        nnx.update(target, nnx.state(source))
        for mode in "train", "eval":
            models = nnx.clone(source), nnx.clone(target)
            for model in models:
                getattr(model, mode)()
            a, b = (model(IMAGES) for model in models)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
