"""The table of networks, arms and placements: what they are made of, and what they compute."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import bn_jax as bn
from bn_jax.layers.linen import BatchNorm
from bn_jax.train.build import build_model
from bn_jax.train.config import TrainConfig
from bn_jax.train.models import NormalizedLayer

SIZES = {"hidden": (5, 4), "filters": 3, "blocks": 1}

# Hidden layers: where they stand, their linear map, its kernel. Then the logits.
NETWORKS = {
    "mlp": [
        ("NormalizedLayer_0", "Dense_0", (784, 5)),
        ("NormalizedLayer_1", "Dense_0", (5, 4)),
        ("", "Dense_0", (4, 10)),
    ],
    "cnn": [
        ("NormalizedLayer_0", "Conv_0", (3, 3, 1, 3)),
        ("NormalizedLayer_1", "Conv_0", (3, 3, 3, 6)),
        ("NormalizedLayer_2", "Dense_0", (7 * 7 * 6, 128)),
        ("", "Dense_0", (128, 10)),
    ],
    "tower": [
        ("Tower_0/NormalizedLayer_0", "Conv_0", (3, 3, 1, 3)),
        ("Tower_0/ResidualBlock_0/NormalizedLayer_0", "Conv_0", (3, 3, 3, 3)),
        ("Tower_0/ResidualBlock_0", "Conv_0", (3, 3, 3, 3)),
        ("PolicyHead_0/NormalizedLayer_0", "Conv_0", (1, 1, 3, 2)),
        ("PolicyHead_0", "Dense_0", (28 * 28 * 2, 10)),
    ],
}
CASES = [
    case
    for case in itertools.product(NETWORKS, ("batch", "none"), ("pre-activation", "input"))
    if case[0] != "tower" or case[2] == "pre-activation"
]
each_case = pytest.mark.parametrize(("model", "arm", "placement"), CASES)


def build(model, arm, placement="pre-activation", **options):
    return build_model(TrainConfig(model=model, placement=placement, **SIZES | options), arm)


def shapes(tree):
    return {path.strip("/"): leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


@each_case
def test_parameters_and_statistics_by_name(model, arm, placement, images):
    params, stats = {}, {}
    *hidden, logits = NETWORKS[model]
    for where, linear, kernel in hidden:
        params[f"{where}/{linear}/kernel"] = kernel
        # The bias is batch norm's own where batch norm follows.
        if arm == "none" or placement == "input":
            params[f"{where}/{linear}/bias"] = kernel[-1:]
        if arm == "batch":
            features = kernel[-2:-1] if placement == "input" else kernel[-1:]
            params |= {f"{where}/BatchNorm_0/{name}": features for name in ("scale", "bias")}
            stats |= {f"{where}/BatchNorm_0/{n}": features for n in ("mean", "var", "count")}
    where, linear, kernel = logits
    params |= {
        f"{where}/{linear}/kernel".strip("/"): kernel,
        f"{where}/{linear}/bias".strip("/"): kernel[-1:],
    }
    network = build(model, arm, placement)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
    assert shapes(variables["params"]) == params
    assert ("batch_stats" in variables) == (arm == "batch")
    assert shapes(variables.get("batch_stats", {})) == stats


@each_case
@pytest.mark.parametrize("train", [True, False])
def test_images_to_logits(model, arm, placement, train, images):
    network = build(model, arm, placement)

    def forward(images):
        variables = network.init(jax.random.key(0), images, train=False)
        return network.apply(variables, images, train=train, mutable=["batch_stats"])

    logits, updates = jax.eval_shape(forward, images)
    assert (logits.shape, logits.dtype) == ((8, 10), jnp.float32)
    assert ("batch_stats" in updates) == (arm == "batch")


@each_case
def test_only_training_with_batch_norm_mixes_the_images(model, arm, placement, fill, images):
    network = build(model, arm, placement)
    variables = fill(network, images)
    others = np.concatenate([images[:4], np.zeros_like(images[4:])])
    for train in (True, False):
        forward = jax.jit(
            lambda x, train=train: network.apply(
                variables, x, train=train, mutable=["batch_stats"]
            )[0]
        )
        moved = jnp.abs(forward(images)[:4] - forward(others)[:4]).max()
        # Exactly nothing, since each row of a product is a sum of its own in the same order.
        assert (moved > 1e-3) if train and arm == "batch" else (moved == 0)


@pytest.mark.parametrize("model", NETWORKS)
def test_logits_are_not_normalized(model, fill, images):
    """They are linear in the last layer, which no normalization of them would be."""
    network = build(model, "batch")
    variables = fill(network, images)
    where, linear, _ = NETWORKS[model][-1]
    last = [*where.split("/"), linear] if where else [linear]

    @jax.jit
    def forward(factor):
        def scaled(path, leaf):
            return leaf * factor if [key.key for key in path[:-1]] == last else leaf

        params = jax.tree.map_with_path(scaled, variables["params"])
        updated = variables | {"params": params}
        return network.apply(updated, images, train=True, mutable=["batch_stats"])[0]

    np.testing.assert_allclose(forward(4.0), 4 * forward(1.0), rtol=1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("placement", ["pre-activation", "input", "without"])
def test_a_layer_is_the_papers_formula(placement, train):
    """z = g(BN(Wu)), z = g(W BN(u) + b), z = g(Wu + b), by the functional core."""
    u, kernel = (jnp.asarray(np.random.default_rng(n).normal(size=(6, 6)))[:, n:] for n in (3, 1))
    average = bn.DebiasedEma(0.9)
    norm = functools.partial(BatchNorm, average=average, unbiased=True, epsilon=0.1)
    before = placement == "pre-activation"
    layer = NormalizedLayer(
        functools.partial(nn.Dense, 5, bias_init=nn.initializers.ones),
        nn.sigmoid,
        None if placement == "without" else norm,
        "pre-activation" if placement == "without" else placement,
    )
    kernel = kernel[:3]
    features = 5 if before else 3
    dense = {"kernel": kernel} if before else {"kernel": kernel, "bias": jnp.full(5, 0.5)}
    params = bn.BatchNormParams(jnp.linspace(0.5, 2, features), jnp.linspace(-1, 1, features))
    state = bn.BatchNormState(params.bias, params.scale, jnp.full(features, 3))
    variables = {"params": {"Dense_0": dense}}
    if placement != "without":
        variables["params"]["BatchNorm_0"] = params._asdict()
        variables["batch_stats"] = {"BatchNorm_0": state._asdict()}
    z, updates = layer.apply(variables, u, train, mutable=["batch_stats"])

    def normalize(x):
        return bn.batch_norm(x, params, state, train=train, average=average, epsilon=0.1)

    if before:
        y, new = normalize(u @ kernel)
    else:
        u, new = (u, None) if placement == "without" else normalize(u)
        y = u @ kernel + 0.5
    np.testing.assert_allclose(z, jax.nn.sigmoid(y), rtol=1e-6)
    assert ("batch_stats" in updates) == (new is not None)
    if new is not None:
        for name, value in new._asdict().items():
            np.testing.assert_allclose(updates["batch_stats"]["BatchNorm_0"][name], value)


def test_the_cnn_pools_twice_by_two(images):
    network = build("cnn", "none")

    def forward():
        variables = network.init(jax.random.key(0), images, train=False)
        return network.apply(variables, images, train=False, capture_intermediates=True)

    seen = flatten_dict(jax.eval_shape(forward)[1]["intermediates"], sep="/")
    assert seen["NormalizedLayer_0/__call__"][0].shape == (8, 28, 28, 3)
    assert seen["NormalizedLayer_1/__call__"][0].shape == (8, 14, 14, 6)
    assert seen["NormalizedLayer_2/__call__"][0].shape == (8, 128)


def test_the_cnn_keeps_the_largest_of_four(fill, images):
    """With the identity for a convolution: pixels below the largest of a square do not matter."""
    network = build("cnn", "none", activation="relu")
    variables = fill(network, images)
    identity = jnp.zeros((3, 3, 1, 3)).at[1, 1].set(1.0)
    variables["params"]["NormalizedLayer_0"]["Conv_0"] = {"kernel": identity, "bias": jnp.zeros(3)}
    pooled = images.reshape(8, 14, 2, 14, 2).max((2, 4)).repeat(2, 1).repeat(2, 2)
    forward = jax.jit(lambda x: network.apply(variables, x, train=False))
    np.testing.assert_array_equal(forward(images), forward(pooled))
