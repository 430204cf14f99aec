"""The network of Silver et al. (2017), Methods: its structure, and the block by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import lax

import bn_jax as bn
from bn_jax.layers.linen import BatchNorm
from bn_jax.train.models import AlphaGoZero, ResidualBlock

SMALL = AlphaGoZero(filters=6, blocks=2, normalization=BatchNorm)


@pytest.fixture(scope="module")
def planes():
    return np.random.default_rng(0).uniform(size=(3, 19, 19, 17)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(fill, planes):
    return fill(SMALL, planes)


def init_shapes(network, planes):
    return jax.eval_shape(lambda: network.init(jax.random.key(0), planes, train=False))


@pytest.mark.parametrize("blocks", [19, 39])
def test_the_papers_number_of_parameters(blocks, planes):
    network = AlphaGoZero(blocks=blocks, normalization=BatchNorm)
    conv, board = 3 * 3 * 256, 19 * 19
    tower = conv * 17 + 2 * blocks * conv * 256 + (1 + 2 * blocks) * 2 * 256
    policy = 256 * 2 + 2 * 2 + (2 * board + 1) * 362
    value = 256 * 1 + 2 * 1 + (board + 1) * 256 + (256 + 1) * 1
    leaves = jax.tree.leaves(init_shapes(network, planes)["params"])
    assert sum(leaf.size for leaf in leaves) == tower + policy + value


def test_only_dense_layers_have_a_bias_besides_batch_norm(planes):
    params = flatten_dict(init_shapes(SMALL, planes)["params"])
    with_bias = {path[-2] for path in params if path[-1] == "bias"}
    assert with_bias == {"BatchNorm_0", "Dense_0", "Dense_1"}
    norms = {path[:-1] for path in params if path[-2] == "BatchNorm_0"}
    assert len(norms) == 1 + 2 * 2 + 1 + 1
    without = flatten_dict(init_shapes(AlphaGoZero(filters=6, blocks=2), planes)["params"])
    assert {path[-2] for path in without} == {"Conv_0", "Dense_0", "Dense_1"}
    biases = [path for path in without if path[-1] == "bias"]
    assert len(biases) == len(without) / 2


@pytest.mark.parametrize("train", [True, False])
def test_a_policy_and_a_value(train, variables, planes):
    (policy, value), _ = jax.jit(
        lambda: SMALL.apply(variables, planes, train=train, mutable=["batch_stats"])
    )()
    assert policy.shape == (3, 362)
    assert value.shape == (3,)
    assert np.all(np.abs(value) < 1)


def test_the_value_is_bounded_and_the_policy_is_not(variables, planes):
    """Weights a thousand times as large saturate tanh, not the logits."""
    large = jax.tree.map_with_path(
        lambda path, leaf: leaf * 1000 if path[-2].key.startswith("Dense") else leaf,
        variables["params"],
    )
    forward = jax.jit(lambda: SMALL.apply(variables | {"params": large}, planes, train=False))
    policy, value = forward()
    np.testing.assert_allclose(np.abs(value), 1)
    assert np.abs(policy).max() > 1


@pytest.fixture
def block():
    """A block's variables, and an input of both signs."""
    random = np.random.default_rng(2)
    kernels = jnp.asarray(random.normal(0, 0.3, (2, 3, 3, 4, 4)), jnp.float32)
    params, state = bn.init(4)
    stats = {"mean": state.mean, "var": state.var}
    variables = {
        "params": {
            "NormalizedLayer_0": {
                "Conv_0": {"kernel": kernels[0]},
                "BatchNorm_0": params._asdict(),
            },
            "Conv_0": {"kernel": kernels[1]},
            "BatchNorm_0": params._asdict(),
        },
        "batch_stats": {"NormalizedLayer_0": {"BatchNorm_0": stats}, "BatchNorm_0": stats},
    }
    return variables, jnp.asarray(random.normal(size=(3, 5, 5, 4)), jnp.float32)


@pytest.mark.parametrize("train", [True, False])
def test_a_zero_scale_makes_the_block_a_rectifier(train, block):
    """So that where its input is not negative, as after another block, it is the identity."""
    variables, x = block
    variables["params"]["BatchNorm_0"]["scale"] = jnp.zeros(4)
    y, _ = ResidualBlock(filters=4, normalization=BatchNorm).apply(
        variables, x, train, mutable=["batch_stats"]
    )
    np.testing.assert_array_equal(y, jnp.maximum(x, 0))


@pytest.mark.parametrize("train", [True, False])
def test_the_block_by_hand(train, block):
    """conv → BN → ReLU → conv → BN → add the input → ReLU."""
    variables, x = block

    def conv(x, layer):
        layout = ("NHWC", "HWIO", "NHWC")
        kernel = layer["Conv_0"]["kernel"]
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    def norm(x):
        return bn.batch_norm(x, *bn.init(4), train=train)[0]

    params = variables["params"]
    hidden = jax.nn.relu(norm(conv(x, params["NormalizedLayer_0"])))
    expected = jax.nn.relu(x + norm(conv(hidden, params)))
    y, _ = ResidualBlock(filters=4, normalization=BatchNorm).apply(
        variables, x, train, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_without_batch_norm_the_block_has_biases(block):
    variables, x = block
    params = variables["params"]
    del params["NormalizedLayer_0"]["BatchNorm_0"], params["BatchNorm_0"]
    params["NormalizedLayer_0"]["Conv_0"]["bias"] = jnp.zeros(4)

    def forward(bias):
        params["Conv_0"]["bias"] = jnp.full(4, bias)
        return ResidualBlock(filters=4).apply({"params": params}, x, False)

    # The second one reaches the output as it is, where the rectifier lets it.
    np.testing.assert_allclose(forward(101.0), forward(100.0) + 1, rtol=1e-6)
