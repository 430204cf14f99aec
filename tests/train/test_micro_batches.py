"""A step in several passes: averaged gradients, and one update of the statistics by all it saw."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.build import build_model
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import train
from bn_jax.train.state import TrainState, init_state, remember
from bn_jax.train.step import binarize, make_train_step, passes

pytestmark = pytest.mark.usefixtures("lenient")

DECAY, BATCH, PARTS = 0.75, 12, 3
MODELS = {
    "mlp": {"hidden": (6, 5), "init_std": 0.3},
    "input": {"hidden": (6, 5), "init_std": 0.3, "placement": "input"},
    "cnn": {"model": "cnn", "filters": 2},
    "tower": {"model": "tower", "filters": 2, "blocks": 1},
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def in_parts(parts, model, state, *batch):
    """Loss, new statistics and gradients."""
    found = passes(model, state, *batch, parts)
    config = TrainConfig(average="ema", decay=DECAY)
    return found.loss, remember(config, state.batch_stats, found.moments), found.grads


whole = functools.partial(in_parts, 1)


def setup(name, fill, digits, arm="batch"):
    """Model, a state with a past, and a batch."""
    config = TrainConfig(average="ema", decay=DECAY, batch_size=BATCH, **MODELS[name])
    model = build_model(config, arm)
    images = jnp.asarray(digits.train_images[:BATCH])
    variables = fill(model, images.astype(jnp.float32))
    stats = variables.get("batch_stats", {})
    for layer in layers(stats):
        layer["count"] = jnp.full(layer["mean"].shape, 5, jnp.int32)
    state = TrainState(variables["params"], stats, (), jnp.int32(0), jax.random.key(0))
    return model, state, binarize(images, "threshold", state.key), labels_of(digits)


def labels_of(digits):
    return jnp.asarray(digits.train_labels[:BATCH], jnp.int32)


def layers(tree):
    """All layers of a tree of statistics, in its order."""
    if "var" in tree or not tree:
        return [tree] if tree else []
    return [layer for branch in tree.values() for layer in layers(branch)]


def close(tree, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, expected)


@functools.partial(jax.jit, static_argnums=0)
def inputs_of_batch_norms(model, state, inputs):
    """What each batch norm normalizes, in the order of its statistics."""
    seen = {}

    def look(call, arguments, options, context):
        if type(context.module).__name__ == "BatchNorm":
            seen[context.module.path] = arguments[0]
        return call(*arguments, **options)

    with nn.intercept_methods(look):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    return seen


def at(tree, path):
    return tree if not path else at(tree[path[0]], path[1:])


@pytest.mark.parametrize("name", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_the_statistics_are_those_of_all_parts_together(name, fill, digits):
    """Each part normalized by itself; then mean and m/(m - 1) variance of all, in float64."""
    model, state, inputs, labels = setup(name, fill, digits)
    loss, stats, grads = in_parts(PARTS, model, state, inputs, labels)

    parts = np.split(np.asarray(inputs), PARTS), np.split(np.asarray(labels), PARTS)
    seen = [inputs_of_batch_norms(model, state, part) for part in parts[0]]
    assert len(seen[0]) == len(layers(stats)) > 1
    for path in seen[0]:
        x = np.concatenate([np.asarray(part[path], np.float64) for part in seen])
        x = x.reshape(-1, x.shape[-1])
        old, new = at(state.batch_stats, path), at(stats, path)
        mean = DECAY * np.asarray(old["mean"], np.float64) + (1 - DECAY) * x.mean(0)
        var = DECAY * np.asarray(old["var"], np.float64) + (1 - DECAY) * x.var(0, ddof=1)
        # Values of size 1 or so, which the two programs may round a few times differently on
        # their way through the layers.
        np.testing.assert_allclose(new["mean"], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new["var"], var, rtol=1e-5, atol=1e-5)
        assert np.all(new["count"] == 6)

    each = [whole(model, state, *part) for part in zip(*parts, strict=True)]
    assert float(loss) == pytest.approx(np.mean([float(e[0]) for e in each]), rel=1e-5)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / PARTS, *(e[2] for e in each))
    close(grads, mean, rtol=1e-4, atol=1e-5)


def test_parts_of_one_content_are_one(fill, digits):
    """To be repeated changes no mean, no variance and no gradient."""
    model, state, inputs, labels = setup("mlp", fill, digits)
    inputs, labels = jnp.tile(inputs, (PARTS, 1, 1)), jnp.tile(labels, PARTS)
    got = in_parts(PARTS, model, state, inputs, labels)
    close(got, whole(model, state, inputs, labels), rtol=1e-5, atol=1e-6)


def test_without_batch_norm_parts_make_no_difference(fill, digits):
    model, state, inputs, labels = setup("mlp", fill, digits, arm="none")
    got = in_parts(PARTS, model, state, inputs, labels)
    close(got, whole(model, state, inputs, labels), rtol=1e-5, atol=1e-6)


def test_parts_that_are_not_finite_leave_the_statistics_as_they_were(fill, digits):
    model, state, inputs, labels = setup("mlp", fill, digits)
    _, stats, _ = in_parts(PARTS, model, state, inputs.at[BATCH // PARTS].set(jnp.nan), labels)
    jax.tree.map(np.testing.assert_array_equal, stats, state.batch_stats)


def test_parts_are_ghost_batch_norm(digits):
    """Ten steps in 3 passes over 8 examples each, or in one with groups of 8."""
    sizes = {"hidden": (8, 8), "init_std": 0.3, "learning_rate": 0.5, "batch_size": 24}
    sizes |= {"steps": 10, "evaluate_every": 10}
    ends = []
    for split in ({"micro_batches": 3}, {"group_size": 8}, {}):
        config = TrainConfig(**sizes, **split)
        *_, ((state, *_), (evaluation,)) = train(config, "batch", digits)
        ends.append(((state.params, state.batch_stats), evaluation.train_loss))
    (parts, loss), (groups, same), (whole, other) = ends
    assert loss == pytest.approx(same, rel=1e-5)
    # Ten steps of sums of 24 terms, 24·2⁻²⁴ = 1.4e-6 each.
    close(parts, groups, rtol=1e-4, atol=1.5e-5)
    assert abs(loss - other) > 1e-3  # and groups do make a difference
    with pytest.raises(AssertionError):
        close(parts, whole, rtol=1e-4, atol=1.5e-5)


def test_the_state_keeps_its_shape(digits):
    """As `lax.scan` demands; traced, not compiled."""
    for name, fields in MODELS.items():
        config = TrainConfig(batch_size=BATCH, micro_batches=PARTS, **fields)
        for arm in ("batch", "none"):
            images = digits.train_images[:BATCH]

            def both(config=config, arm=arm, images=images):
                state = init_state(config, arm, images)
                return state, make_train_step(config, arm)(state, images, labels_of(digits))[0]

            old, new = jax.eval_shape(both)
            assert jax.tree.structure(old) == jax.tree.structure(new), name
            for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
                assert (x.shape, x.dtype) == (y.shape, y.dtype)
