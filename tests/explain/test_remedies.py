"""Every remedy runs as it stands, where its names have their usual meaning."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bn_jax
import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.cli import COMMANDS
from bn_jax.explain.causes import CAUSES, TRAIN_FLAG
from bn_jax.hints import check_flags, describe_flags

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
LAYERS = {"linen": bn_jax.layers.linen.BatchNorm, "nnx": bn_jax.layers.nnx.BatchNorm}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return LAYERS["linen"](use_running_average=not train)(x)


@functools.cache
def usual_names(api):
    """What a user of an API has at hand."""
    names = {
        **{"jax": jax, "np": np, "optax": optax, "nnx": nnx, "bn_jax": bn_jax},
        **{"x": X, "images": X, "labels": np.arange(8), "batches": [X, X], "epoch": 1},
        **{"learning_rate": 0.1, "steps": 10, "optimizer": optax.sgd(0.1)},
        **{"train_mean": X.mean(), "train_std": X.std()},
    }
    if api == "functional":
        params, state = bn_jax.init(3)

        def forward(params, state, x):
            return bn_jax.batch_norm(x, params, state, train=True)[1]

        return names | {"params": params, "state": state, "states": state, "forward": forward}
    if api == "linen":
        model = Linen()
        variables = model.init(jax.random.key(0), X)

        def forward(variables, x):
            return model.apply(variables, x, mutable=["batch_stats"])

        return names | {
            "model": model,
            "variables": variables,
            "forward": forward,
            "BatchNorm": LAYERS["linen"],
        }
    model = LAYERS["nnx"](3, rngs=nnx.Rngs(0))
    return names | {
        "model": model,
        "forward": lambda model, x: model(x),
        "train_step": lambda model: model(X),
        "BatchNorm": lambda **options: LAYERS["nnx"](3, rngs=nnx.Rngs(0), **options),
    }


@pytest.fixture
def settings():
    """Those that a remedy changes are put back."""
    before = jax.config.jax_debug_nans
    yield
    jax.config.update("jax_debug_nans", before)


@pytest.mark.parametrize("api", ["functional", "linen", "nnx"])
def test_code_runs(api, lenient, settings):
    for cause in (TRAIN_FLAG, *CAUSES):
        code, names = cause.remedy[api], dict(usual_names(api))
        if api == "nnx":
            names["model"] = nnx.clone(names["model"])
        assert max(map(len, code.splitlines())) <= 88, cause.name
        exec(code, names)
        if "recalibrate" in code:
            after = {"functional": "states", "linen": "variables", "nnx": "model"}[api]
            found = jax.tree.leaves(nnx.state(names[after]) if api == "nnx" else names[after])
            assert any(np.allclose(leaf, X.mean(0), atol=1e-5) for leaf in found), cause.name
        jax.config.update("jax_debug_nans", False)


def test_commands_are_commands():
    for cause in (TRAIN_FLAG, *CAUSES):
        for line in cause.remedy["run"].splitlines():
            words = [w for w in line.partition("#")[0].split() if "=" not in w]
            assert words[0] == "bn-jax", line
            check_flags(words[1], describe_flags(COMMANDS[words[1]]), words[2:])


def test_the_remedy_is_of_the_layers_own_averages():
    """What the remedy for a young average promises, it keeps: one step is enough."""
    names = dict(usual_names("linen"))
    exec("layer = BatchNorm(average=bn_jax.DebiasedEma(0.99), use_running_average=False)", names)
    _, updates = names["layer"].init_with_output(jax.random.key(0), X)
    variables = names["layer"].apply(updates, X, mutable=["batch_stats"])[1]
    assert jnp.allclose(variables["batch_stats"]["mean"], X.mean(0), atol=1e-6)
