"""Scores by running, population and batch statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train import scoring
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import train
from bn_jax.train.scoring import inputs, make_score
from bn_jax.train.state import init_state
from bn_jax.train.step import binarize

CONFIG = TrainConfig(hidden=(16,), batch_size=20, steps=60, evaluate_every=60, learning_rate=1.0)


@pytest.fixture(scope="module")
def trained(digits):
    with jax.numpy_dtype_promotion("standard"):
        *_, (progress, _) = train(CONFIG, "batch", digits)
    return progress.state


def scores(state, digits, arm="batch"):
    return {
        kind: make_score(dataclasses.replace(CONFIG, statistics=kind), arm, digits)(state).item()
        for kind in ("running", "population", "batch")
    }


def test_statistics_that_were_lost_are_to_blame(trained, digits, lenient):
    """Population and batch statistics do not read what is remembered."""
    sound = scores(trained, digits)
    lost = jax.tree.map(lambda leaf: leaf + 100, trained.batch_stats)
    broken = scores(trained._replace(batch_stats=lost), digits)
    assert broken["running"] < sound["running"] - 0.1
    assert broken["population"] == sound["population"] > broken["running"]
    assert broken["batch"] == sound["batch"] > broken["running"]


def test_without_batch_norm_all_are_one(digits, lenient):
    state = init_state(CONFIG, "none", digits.train_images[:2])
    assert len(set(scores(state, digits, "none").values())) == 1


def test_each_batch_has_its_own_stochastic_input(digits, lenient, monkeypatch):
    """Of the same grey images; otherwise many batches would say no more than one."""
    grey = np.full((40, 28, 28), 128, np.uint8)
    one, other = inputs(grey, 20, "stochastic")
    assert 0.45 < jnp.mean(one != other) < 0.55
    seen = []
    config = dataclasses.replace(CONFIG, binarization="stochastic", statistics="population")
    state = init_state(config, "batch", grey[:2])

    def recorded(images, how, key):
        jax.debug.callback(lambda key: seen.append(tuple(key.tolist())), jax.random.key_data(key))
        return binarize(images, how, key)

    monkeypatch.setattr(scoring, "binarize", recorded)
    make_score(
        config,
        "batch",
        digits._replace(
            train_images=grey, test_images=grey[:1], test_labels=digits.test_labels[:1]
        ),
    )(state)
    jax.effects_barrier()
    assert len(set(seen)) == 3  # of two batches, and of the test images
