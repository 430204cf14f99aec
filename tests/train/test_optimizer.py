"""The optimizer of a configuration: its schedule, and a weight decay that spares scale and bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train.build import build_model, build_optimizer
from bn_jax.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("lenient")


def updates(config, params, gradients, steps):
    """What the optimizer adds to the parameters, step by step."""
    optimizer = build_optimizer(config)
    state, added = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        change, state = update(gradients, state, params)
        added.append(change)
    return added


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "tower"])
def test_without_gradients_only_kernels_shrink(model, optimizer, fill, images):
    """By learning rate times weight decay: decoupled, in Adam too."""
    config = TrainConfig(
        model=model,
        optimizer=optimizer,
        learning_rate=0.5,
        weight_decay=0.1,
        hidden=(3,),
        filters=2,
        blocks=1,
    )
    params = fill(build_model(config, "batch"), images)["params"]
    (change,) = updates(config, params, jax.tree.map(jnp.zeros_like, params), 1)

    def check(path, change, value):
        factor = -0.5 * 0.1 if path[-1].key == "kernel" else 0
        np.testing.assert_allclose(change, factor * value, rtol=1e-6)

    jax.tree.map_with_path(check, change, params)


def test_without_weight_decay_nothing_shrinks(fill, images):
    config = TrainConfig(hidden=(3,))
    params = fill(build_model(config, "none"), images)["params"]
    (change,) = updates(config, params, jax.tree.map(jnp.zeros_like, params), 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(change))


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        ("constant", lambda part: 0.3),
        ("cosine", lambda part: 0.3 * (1 + np.cos(np.pi * part)) / 2),
        ("exponential", lambda part: 0.3 * 0.01**part),
    ],
)
def test_the_schedule_spans_the_run(schedule, rate):
    config = TrainConfig(schedule=schedule, learning_rate=0.3, steps=8)
    got = updates(config, {"kernel": jnp.ones(())}, {"kernel": jnp.ones(())}, 8)
    expected = [-rate(step / 8) for step in range(8)]
    np.testing.assert_allclose([u["kernel"] for u in got], expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "exponential"])
def test_a_run_without_steps_has_an_optimizer(schedule):
    config = TrainConfig(schedule=schedule, steps=0, learning_rate=0.3)
    (got,) = updates(config, {"kernel": jnp.ones(())}, {"kernel": jnp.ones(())}, 1)
    np.testing.assert_allclose(got["kernel"], -0.3, rtol=1e-6)


def test_momentum_sums_what_was():
    config = TrainConfig(optimizer="momentum", learning_rate=1.0)
    got = updates(config, {"kernel": jnp.ones(())}, {"kernel": jnp.ones(())}, 3)
    np.testing.assert_allclose([u["kernel"] for u in got], [-1, -1.9, -2.71], rtol=1e-6)


def test_adam_knows_no_scale():
    config = TrainConfig(optimizer="adam", learning_rate=1.0)
    gradients = {"kernel": jnp.asarray([1e-3, -1e3])}
    (got,) = updates(config, {"kernel": jnp.ones(2)}, gradients, 1)
    np.testing.assert_allclose(got["kernel"], [-1, 1], rtol=1e-4)
