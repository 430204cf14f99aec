"""One step of SGD against the paper's equations in numpy, float64; and the evaluation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.data import Dataset
from bn_jax.train.build import build_model, build_optimizer
from bn_jax.train.config import TrainConfig
from bn_jax.train.scoring import make_score
from bn_jax.train.state import TrainState, init_state
from bn_jax.train.step import make_train_step

EPSILON, DECAY, RATE = 0.01, 0.9, 0.5


@pytest.fixture
def config():
    return TrainConfig(
        hidden=(6,), epsilon=EPSILON, decay=DECAY, average="ema", learning_rate=RATE, batch_size=8
    )


@pytest.fixture
def batch(digits):
    return jnp.asarray(digits.train_images[:8]), jnp.asarray(digits.train_labels[:8], jnp.int32)


def make_state(config, arm, fill, images, seed=0):
    model, optimizer = build_model(config, arm), build_optimizer(config)
    variables = fill(model, images.astype(jnp.float32))
    params, stats = variables["params"], variables.get("batch_stats", {})
    if stats:
        stats["NormalizedLayer_0"]["BatchNorm_0"]["count"] = jnp.zeros(6, jnp.int32)
    return TrainState(
        params, stats, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(seed)
    )


def softmax_gradient(logits, labels):
    """The loss -mean log p, and (p - onehot)/m."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    onehot = np.eye(10)[labels]
    return -np.mean(np.log(p[onehot == 1])), (p - onehot) / len(labels)


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("arm", ["batch", "none"])
def test_a_step_by_hand(arm, config, fill, batch, lenient):
    images, labels = batch
    state = make_state(config, arm, fill, images)
    new, loss = jax.jit(make_train_step(config, arm))(state, images, labels)

    params = double(state.params)
    layer, last = params["NormalizedLayer_0"], params["Dense_0"]
    u = (np.asarray(images) > 127).reshape(8, -1).astype(np.float64)
    a = u @ layer["Dense_0"]["kernel"]
    if arm == "batch":
        norm = layer["BatchNorm_0"]
        mean, var = a.mean(0), a.var(0)
        r = 1 / np.sqrt(var + EPSILON)
        x_hat = (a - mean) * r
        y = norm["scale"] * x_hat + norm["bias"]
    else:
        y = a + layer["Dense_0"]["bias"]
    z = 1 / (1 + np.exp(-y))
    expected_loss, d_logits = softmax_gradient(z @ last["kernel"] + last["bias"], labels)
    dy = d_logits @ last["kernel"].T * z * (1 - z)
    grads = {"Dense_0": {"kernel": z.T @ d_logits, "bias": d_logits.sum(0)}}
    if arm == "batch":
        dx = norm["scale"] * r * (dy - dy.mean(0) - x_hat * (dy * x_hat).mean(0))
        grads["NormalizedLayer_0"] = {
            "Dense_0": {"kernel": u.T @ dx},
            "BatchNorm_0": {"scale": (dy * x_hat).sum(0), "bias": dy.sum(0)},
        }
    else:
        grads["NormalizedLayer_0"] = {"Dense_0": {"kernel": u.T @ dy, "bias": dy.sum(0)}}

    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    # Parameters of size 1 and sums of a hundred terms of it, in float32.
    jax.tree.map(
        lambda got, old, grad: np.testing.assert_allclose(got, old - RATE * grad, atol=3e-6),
        new.params,
        params,
        grads,
    )
    if arm == "batch":
        old = double(state.batch_stats)["NormalizedLayer_0"]["BatchNorm_0"]
        got = new.batch_stats["NormalizedLayer_0"]["BatchNorm_0"]
        for name, value in (("mean", mean), ("var", var * 8 / 7)):
            expected = DECAY * old[name] + (1 - DECAY) * value
            np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)
    else:
        assert new.batch_stats == {}
    assert (int(new.step), new.step.dtype) == (1, jnp.int32)
    assert new.key == state.key


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_steps_are_a_plain_optax_loop(optimizer, config, fill, batch, lenient):
    rule = {
        "sgd": optax.sgd(RATE),
        "momentum": optax.sgd(RATE, momentum=0.9),
        "adam": optax.adam(RATE),
    }[optimizer]
    images, labels = batch
    config = TrainConfig(hidden=(6,), optimizer=optimizer, learning_rate=RATE)
    model, state = build_model(config, "none"), make_state(config, "none", fill, images)
    train_step = jax.jit(make_train_step(config, "none"))

    @jax.jit
    def plain_step(params, opt_state):
        def loss_fn(params):
            logits = model.apply({"params": params}, (images > 127).astype(float), train=True)
            log_p = jax.nn.log_softmax(logits)
            return -jnp.mean(log_p[jnp.arange(8), labels])

        updates, opt_state = rule.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = state.params, rule.init(state.params)
    for _ in range(3):
        state, _ = train_step(state, images, labels)
        params, opt_state = plain_step(params, opt_state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, params
    )


# Optimizer, schedule, average: of each two, every combination.
SQUARE = [
    (
        ("sgd", "momentum", "adam")[i],
        ("constant", "cosine", "exponential")[j],
        averages[(i + j) % 3],
    )
    for averages in [("ema", "debiased", "cumulative")]
    for i, j in itertools.product(range(3), repeat=2)
]


@pytest.mark.parametrize("arm", ["batch", "none"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "tower"])
def test_every_choice_keeps_the_shape_of_the_state(model, arm, batch, lenient):
    """As `lax.scan` demands; traced, not compiled."""
    sizes = {"hidden": (3,), "filters": 2, "blocks": 1, "weight_decay": 0.1}

    def one_step(config):
        state = init_state(config, arm, batch[0])
        return state, *make_train_step(config, arm)(state, *batch)

    for rule, schedule, average in SQUARE if model == "mlp" else SQUARE[::4]:
        config = TrainConfig(
            model=model, optimizer=rule, schedule=schedule, average=average, **sizes
        )
        old, new, loss = jax.eval_shape(lambda config=config: one_step(config))
        assert (loss.shape, loss.dtype) == ((), jnp.float32)
        assert jax.tree.structure(new) == jax.tree.structure(old)
        for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


def test_a_stochastic_input_is_drawn_by_key_and_step(config, fill, batch, lenient):
    images, labels = batch
    state = make_state(config, "none", fill, jnp.full_like(images, 128))
    config = dataclasses.replace(config, binarization="stochastic")
    train_step = jax.jit(make_train_step(config, "none"))

    def loss(state):
        return float(train_step(state, jnp.full_like(images, 128), labels)[1])

    assert loss(state) == loss(state)
    assert loss(state) != loss(state._replace(step=state.step + 1))
    assert loss(state) != loss(state._replace(key=jax.random.key(1)))


@pytest.mark.parametrize("count", [7, 240, 1001])
def test_accuracy_is_the_share_of_right_labels(count, config, fill, digits):
    """Counted in parts of any number of images; by the running statistics, not the batch's."""
    images = jnp.asarray(np.resize(digits.train_images, (count, 28, 28)))
    state = make_state(config, "batch", fill, images)
    stats = double(state.batch_stats)["NormalizedLayer_0"]["BatchNorm_0"]
    params = double(state.params)
    layer, last = params["NormalizedLayer_0"], params["Dense_0"]
    a = (np.asarray(images) > 127).reshape(count, -1) @ layer["Dense_0"]["kernel"]
    x_hat = (a - stats["mean"]) / np.sqrt(stats["var"] + EPSILON)
    y = layer["BatchNorm_0"]["scale"] * x_hat + layer["BatchNorm_0"]["bias"]
    said = (1 / (1 + np.exp(-y)) @ last["kernel"] + last["bias"]).argmax(1)
    # Labels of which two in three are what the network says, whatever it says.
    labels = np.where(np.arange(count) % 3 == 0, (said + 1) % 10, said)
    examples = np.asarray(images), labels
    got = make_score(config, "batch", Dataset(*examples, *examples))(state)
    assert got.item() == pytest.approx(np.mean(said == labels), abs=1e-6)
