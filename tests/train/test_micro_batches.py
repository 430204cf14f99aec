"""A step in several passes: averaged gradients, and one update of the statistics by all it saw."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.core.averages import Ema
from bn_jax.train.build import build_model, build_optimizer
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import build_gradients, train
from bn_jax.train.micro_batches import accumulate
from bn_jax.train.placement import ONE_DEVICE
from bn_jax.train.step import TrainState, binarize, init_state, whole_batch

pytestmark = pytest.mark.usefixtures("lenient")

DECAY, BATCH, PARTS = 0.75, 12, 3
MODELS = {
    "mlp": {"hidden": (6, 5), "init_std": 0.3},
    "input": {"hidden": (6, 5), "init_std": 0.3, "placement": "input"},
    "cnn": {"model": "cnn", "filters": 2},
    "tower": {"model": "tower", "filters": 2, "blocks": 1},
}


whole = jax.jit(whole_batch, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def in_parts(parts, model, *arguments):
    return accumulate(parts, Ema(DECAY))(model, *arguments)


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


def test_one_part_is_the_plain_step():
    assert build_gradients(TrainConfig(), ONE_DEVICE) is whole_batch
    assert build_gradients(TrainConfig(micro_batches=2), ONE_DEVICE) is not whole_batch


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


def test_a_part_that_is_not_finite_is_left_out(fill, digits):
    """As the layer leaves out a whole batch: its features keep what the other parts say."""
    model, state, inputs, labels = setup("mlp", fill, digits)
    size = BATCH // PARTS
    bad = inputs.at[size].set(jnp.nan)
    _, stats, _ = in_parts(PARTS, model, state, bad, labels)
    good = np.delete(np.asarray(inputs, np.float64), np.s_[size : 2 * size], axis=0)
    first = state.params["NormalizedLayer_0"]["Dense_0"]["kernel"]
    x = good.reshape(len(good), -1) @ np.asarray(first, np.float64)
    path = ("NormalizedLayer_0", "BatchNorm_0")
    old, new = at(state.batch_stats, path), at(stats, path)
    for name, value in (("mean", x.mean(0)), ("var", x.var(0, ddof=1))):
        expected = DECAY * np.asarray(old[name]) + (1 - DECAY) * value
        np.testing.assert_allclose(new[name], expected, rtol=1e-5, atol=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(stats))

    _, stats, _ = in_parts(PARTS, model, state, jnp.full_like(inputs, jnp.nan), labels)
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
        config = TrainConfig(batch_size=BATCH, **fields)
        for arm in ("batch", "none"):
            model, optimizer = build_model(config, arm), build_optimizer(config)
            images = jnp.asarray(digits.train_images[:BATCH])

            def both(model=model, optimizer=optimizer, images=images):
                state = init_state(model, optimizer, images, 0)
                inputs = images.astype(jnp.float32)
                gradients = accumulate(PARTS, Ema(DECAY))
                _, stats, grads = gradients(model, state, inputs, labels_of(digits))
                return (state.batch_stats, state.params), (stats, grads)

            old, new = jax.eval_shape(both)
            assert jax.tree.structure(old) == jax.tree.structure(new), name
            for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
                assert (x.shape, x.dtype) == (y.shape, y.dtype)
