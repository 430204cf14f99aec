"""Convolutions are JAX's own, and XLA's fast ones in a loop on a CPU too."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.config import TrainConfig
from bn_jax.train.convolution import convolve
from bn_jax.train.loop import run_chunk
from bn_jax.train.progress import begin
from bn_jax.train.state import init_state
from bn_jax.train.step import make_train_step

FAST = "b01f_01io->b01f"


def layers(**options):
    """JAX's convolution, and ours."""
    make = functools.partial(nn.Conv, 2, use_bias=False, **options)
    return make(), make(conv_general_dilated=convolve)


def draw(*shape):
    """Whole numbers, so that sums of them are exact in any order."""
    return jnp.asarray(np.random.default_rng(len(shape)).integers(-3, 4, shape), jnp.float32)


@pytest.mark.parametrize(
    ("size", "padding"),
    [((3, 3), "SAME"), ((2, 5), "SAME"), ((4, 3), "VALID"), ((3, 3), ((1, 2), (0, 3)))],
)
def test_gradients_are_those_of_jax(size, padding):
    x = draw(2, 6, 5, 3)

    def gradients(layer):
        kernel = draw(*size, 3, 2)
        y, transposed = jax.vjp(lambda k, x: layer.apply({"params": {"kernel": k}}, x), kernel, x)
        return y, *transposed(draw(*y.shape))

    theirs, ours = (gradients(layer) for layer in layers(kernel_size=size, padding=padding))
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def test_second_derivatives_are_those_of_jax():
    x, kernel = draw(2, 3, 3, 1), draw(3, 3, 1, 2)

    def curvature(layer):
        def loss(k):
            return jnp.sum(layer.apply({"params": {"kernel": k}}, x) ** 2)

        return jax.grad(lambda k: jnp.sum(jax.grad(loss)(k) * kernel))(kernel)

    theirs, ours = map(curvature, layers(kernel_size=(3, 3)))
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2},
        {"kernel_dilation": 2},
        {"input_dilation": 2, "padding": ((1, 1), (1, 1))},
        {"feature_group_count": 2},
    ],
)
def test_what_it_does_not_cover_is_jax_own(options):
    """Forward mode tells: ours has none."""
    x = draw(2, 6, 6, 2)
    kernel = draw(3, 3, 2 // options.get("feature_group_count", 1), 2)

    def derivative(layer):
        return jax.jvp(lambda x: layer.apply({"params": {"kernel": kernel}}, x), (x,), (x,))

    theirs, ours = map(derivative, layers(kernel_size=(3, 3), **options))
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)


def orders_in_a_loop(config, digits):
    """The orders of axes in which a chunk of steps convolves, when compiled."""
    images = jnp.asarray(digits.train_images)
    labels = jnp.asarray(digits.train_labels, jnp.int32)
    step = make_train_step(config, "batch")
    start = jax.eval_shape(lambda: begin(init_state(config, "batch", images[:2])))
    lowered = run_chunk.lower(step, start, images, labels, steps=4, batch_size=20)
    text = lowered.compile().as_text()
    assert " while(" in text
    return re.findall(r" convolution\(.*dim_labels=(\S+?),? ", text)


@pytest.mark.parametrize(
    "options", [{"model": "cnn"}, {"model": "tower", "blocks": 1, "micro_batches": 2}]
)
def test_a_loop_has_fast_convolutions_alone(options, digits, lenient):
    orders = orders_in_a_loop(TrainConfig(filters=2, batch_size=20, **options), digits)
    assert len(orders) >= 3
    assert set(orders) == {FAST}


def test_xla_leaves_other_orders_in_a_loop():
    """If this fails, XLA reorders in loops too: `convolution.py` can go, if it is as fast."""
    layer, _ = layers(kernel_size=(3, 3))
    x, kernel = draw(2, 4, 4, 2), draw(3, 3, 2, 2)

    def body(kernel, _):
        def loss(k):
            return jnp.sum(layer.apply({"params": {"kernel": k}}, x) ** 2)

        return kernel - jax.grad(loss)(kernel), None

    text = jax.jit(lambda k: jax.lax.scan(body, k, length=3)).lower(kernel).compile().as_text()
    assert set(re.findall(r"dim_labels=(\S+?),? ", text)) != {FAST}
