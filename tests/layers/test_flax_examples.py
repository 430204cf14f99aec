"""Flax's published examples, of the version that is installed, with the import changed.

Its ImageNet ResNet (linen) and its MNIST net (nnx) are read from the source archive, which pip
fetches and verifies. Nothing of them is changed but where BatchNorm comes from.
"""

import ast
import sys
import types
from functools import partial

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bn_jax.layers.nnx
from tests.layers.draws import normal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lenient")]
LINEN, OURS = "from flax import linen as nn\n", "from bn_jax.layers.linen import BatchNorm\n"


def source_of(archive, path):
    """The text of one file of the archive."""
    (member,) = [m for m in archive.getmembers() if m.name.partition("/")[2] == path]
    return archive.extractfile(member).read().decode()


def as_module(name, source):
    """The source, run as a module; dataclasses look it up by its name."""
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


# The ImageNet ResNet. It names the axis "batch", over which its users map their devices.

PARTS, SHARE = 2, 4
IMAGES = normal((PARTS, SHARE, 64, 64, 3), 0.5)
LABELS = jnp.asarray(np.arange(PARTS * SHARE).reshape(PARTS, SHARE) % 10)


def train_step(model, variables):
    """One step of gradient descent; the loss comes with the new variables."""

    def loss_fn(params, images, labels):
        given = variables | {"params": params}
        logits, updates = model.apply(given, images, train=True, mutable="batch_stats")
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    def of_all(params):
        part = jax.vmap(partial(loss_fn, params), axis_name="batch", out_axes=(0, None))
        losses, updates = part(IMAGES, LABELS)
        return losses.mean(), updates

    (loss, updates), grads = jax.value_and_grad(of_all, has_aux=True)(variables["params"])
    step = lambda p, g: p - 0.01 * g  # noqa: E731
    return loss, {"params": jax.tree.map(step, variables["params"], grads), **updates}


@pytest.fixture(scope="module")
def resnets(flax_archive):
    """Model, loss and variables after two steps: of flax's, and of the same with our BatchNorm."""
    source = source_of(flax_archive, "examples/imagenet/models.py")
    assert source.count("nn.BatchNorm") == source.count(LINEN) == 1
    changed = source.replace(LINEN, LINEN + OURS).replace("nn.BatchNorm", "BatchNorm")
    trained = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for name, text in ("flax_example", source), ("changed_example", changed):
            model = as_module(name, text).ResNet50(num_classes=10)
            variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), IMAGES[0])
            step = jax.jit(partial(train_step, model))
            for _ in range(2):
                loss, variables = step(variables)
            trained.append((model, loss, variables))
    return trained


def logits_of(model, variables):
    return jax.jit(partial(model.apply, train=False))(variables, IMAGES.reshape(-1, 64, 64, 3))


def test_the_resnet_trains(resnets):
    (_, their_loss, theirs), (_, our_loss, ours) = resnets
    np.testing.assert_allclose(our_loss, their_loss, rtol=1e-3)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@pytest.mark.parametrize("into", ["ours", "flax's"])
def test_the_resnets_checkpoint_is_the_others(into, resnets):
    source, target = resnets if into == "ours" else reversed(resnets)
    data = flax.serialization.to_bytes(source[2])
    restored = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, target[2]), data)
    expected = logits_of(source[0], source[2])
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits_of(target[0], restored), expected, rtol=1e-5, atol=1e-5)


# The net for MNIST. Its file trains as well, with packages that are not needed here.


@pytest.fixture(scope="module")
def cnns(flax_archive):
    """Flax's class, and the same with our BatchNorm."""
    source = source_of(flax_archive, "examples/mnist/train.py")
    (cnn,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "CNN"]
    text = ast.get_source_segment(source, cnn)
    assert text.count("nnx.BatchNorm") == 2
    imports = "from functools import partial\nfrom flax import nnx\n"
    ours = "from bn_jax.layers.nnx import BatchNorm\n"
    return [
        as_module("flax_cnn", imports + text).CNN,
        as_module("changed_cnn", imports + ours + text.replace("nnx.BatchNorm", "BatchNorm")).CNN,
    ]


@pytest.mark.parametrize("into", ["ours", "flax's"])
def test_the_cnns_checkpoint_is_the_others(into, cnns):
    images = jax.random.uniform(jax.random.key(2), (8, 28, 28, 1))
    of_source, of_target = cnns if into == "ours" else reversed(cnns)
    source, target = of_source(nnx.Rngs(0)), of_target(nnx.Rngs(1))
    assert any(
        isinstance(m, bn_jax.layers.nnx.BatchNorm) for _, m in nnx.iter_graph((source, target))
    )
    for _ in range(3):
        source(images * 2, nnx.Rngs(3))  # moves the statistics
    data = flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(source)))
    state = nnx.state(target)
    restored = flax.serialization.from_bytes(nnx.to_pure_dict(state), data)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, restored))
    nnx.update(target, state)
    for train in True, False:
        for model in source, target:
            model.train() if train else model.eval()
        rngs = lambda: nnx.Rngs(4) if train else None  # noqa: B023, E731
        expected = source(images, rngs())
        np.testing.assert_allclose(target(images, rngs()), expected, rtol=1e-5, atol=1e-5)
