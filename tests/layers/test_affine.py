"""Scale and bias in the call: conditional batch norm and FiLM, in all shells."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.inference.recalibrate import recalibrate_linen, recalibrate_nnx
from bn_jax.layers.fold import fold_linen, fold_nnx
from tests.layers import draws


def normal(*given, **seed):
    return np.array(draws.normal(*given, **seed))


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
X = normal((6, 2, 2, 3), 5, 2)  # batch, height, width, channels
LABELS = np.array([0, 1, 1, 0, 1, 1])
SHAPES = {"per feature": (3,), "per example": (6, 3), "of x's rank": (1, 2, 1, 3)}
BARE = {"use_scale": False, "use_bias": False}


def in_linen(x, scale, bias, evaluate, mask=None, **options):
    layer = bn_jax.layers.linen.BatchNorm(**BARE, momentum=0.0, **options)
    variables = layer.init(jax.random.key(0), x, True, scale=scale, bias=bias)
    options = {"scale": scale, "bias": bias, "mask": mask, "mutable": ["batch_stats"]}
    y, updates = layer.apply(variables, x, use_running_average=False, **options)
    if evaluate:
        y, _ = layer.apply(updates, x, use_running_average=True, **options)
    return y


def in_nnx(x, scale, bias, evaluate, mask=None, **options):
    layer = bn_jax.layers.nnx.BatchNorm(3, **BARE, momentum=0.0, **options, rngs=nnx.Rngs(0))
    y = layer(x, scale=scale, bias=bias, mask=mask)
    return layer(x, use_running_average=True, scale=scale, bias=bias) if evaluate else y


def equinox_layer(*given, **options):
    """A layer and its state, where Equinox is installed."""
    eqx = pytest.importorskip("equinox")
    from bn_jax.layers.equinox import BatchNorm

    return eqx.nn.make_with_state(BatchNorm)(3, *given, axis=-1, **options)


def in_equinox(x, scale, bias, evaluate, mask=None):
    layer, state = equinox_layer(channelwise_affine=False, momentum=0.0, unbiased=False)
    y, state = layer(x, state, weight=scale, bias=bias, mask=mask)
    return layer(x, state, inference=True, weight=scale, bias=bias)[0] if evaluate else y


SHELLS = {"linen": in_linen, "nnx": in_nnx, "equinox": in_equinox}
each_shell = pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS)


def normalized(x):
    x = np.float64(x)
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)


def full(part):
    return part.reshape(6, 1, 1, 3) if part.shape == (6, 3) else part


@each_shell
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("evaluate", [False, True])
def test_is_applied_to_the_normalized_values(shell, kind, evaluate):
    """With momentum 0, evaluation normalizes by the batch too."""
    scale, bias = normal(SHAPES[kind], 1, seed=1), normal((3,), 0, seed=2)
    y = shell(X, scale, bias, evaluate)
    close(y, normalized(X) * full(scale) + bias)
    assert y.dtype == jnp.float32


@each_shell
def test_gradients_reach_the_tables_of_classes(shell):
    tables, g = (normal((2, 3), 1, seed=1), normal((2, 3), 0, seed=2)), normal(X.shape, seed=3)

    def loss(tables):
        scale, bias = (table[LABELS] for table in tables)
        return jnp.sum(shell(X, scale, bias, evaluate=False) * g)

    scales, biases = jax.grad(loss)(tuple(map(jnp.asarray, tables)))
    for label in (0, 1):
        mine = label == LABELS
        close(scales[label], (normalized(X) * g)[mine].sum((0, 1, 2)), atol=1e-4)
        close(biases[label], g[mine].sum((0, 1, 2)), atol=1e-4)


@each_shell
def test_padding_may_hold_anything(shell):
    spoiled = X.copy()
    spoiled[4:] = np.nan
    scale = jnp.asarray(normal((6, 3), 1, seed=1))
    mask = np.arange(6).reshape(6, 1, 1, 1) < 4
    run = functools.partial(shell, bias=np.ones(3, np.float32), evaluate=False, mask=mask)
    y = run(spoiled, scale)
    close(y[:4], normalized(X[:4]) * full(scale)[:4] + 1)
    close(y[4:], np.ones((2, 2, 2, 3)))  # bias
    gradient = jax.grad(lambda scale: run(spoiled, scale).sum())(scale)
    assert np.isfinite(gradient).all()


def test_under_vmap_equinox_takes_a_row_for_each_example():
    layer, state = equinox_layer("batch", channelwise_affine=False)
    scale, bias = normal((6, 3), 1, seed=1), normal((6, 3), 0, seed=2)

    def one(x, scale, bias):
        return layer(x, state, weight=scale, bias=bias)

    y, _ = jax.vmap(one, axis_name="batch", out_axes=(0, None))(X, scale, bias)
    close(y, normalized(X) * full(scale) + full(bias))


@pytest.mark.parametrize("shell", [in_linen, in_nnx])
def test_with_corrected_statistics_and_half_precision(shell):
    """Of a new state, Batch Renorm corrects nothing; x̂ and y are rounded to bfloat16."""
    scale = normal((6, 3), 1, seed=1)
    y = shell(X, scale, None, evaluate=False, renorm=(3.0, 5.0))
    close(y, normalized(X) * full(scale))
    half = shell(X.astype(jnp.bfloat16), scale, None, evaluate=False, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    expected = normalized(np.float32(X.astype(jnp.bfloat16))) * full(scale)
    np.testing.assert_allclose(np.float32(half), expected, rtol=2**-6, atol=1e-5)


class Conditional(nn.Module):
    """linen: a table of scales for ten classes."""

    @nn.compact
    def __call__(self, x, labels, train):
        x = nn.Dense(3, use_bias=False)(x)
        scale = nn.Embed(2, 3, embedding_init=nn.initializers.normal())(labels)
        norm = bn_jax.layers.linen.BatchNorm(not train, **BARE)
        return nn.Dense(2)(norm(x, scale=scale))


class ConditionalNnx(nnx.Module):
    """nnx: the same."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.table = nnx.Embed(2, 3, rngs=rngs)
        self.norm = bn_jax.layers.nnx.BatchNorm(3, **BARE, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, labels):
        return self.last(self.norm(self.first(x), scale=self.table(labels)))


def test_whole_models_are_recalibrated_and_keep_the_layer_when_folded(lenient):
    x = normal((6, 3), 2)
    model = Conditional()
    variables = model.init(jax.random.key(0), x, LABELS, train=False)

    def forward(variables, x):
        return model.apply(variables, x, LABELS, train=True, mutable=["batch_stats"])

    variables = recalibrate_linen(forward, variables, [x])
    kernel = variables["params"]["Dense_0"]["kernel"]
    close(variables["batch_stats"]["BatchNorm_0"]["mean"], (x @ kernel).mean(0))
    smaller, fewer, report = fold_linen(model, variables, x, LABELS, train=False)
    assert "gets scale or bias in its call" in str(report)
    y = smaller.apply(fewer, x, LABELS, train=False)
    close(y, model.apply(variables, x, LABELS, train=False))

    model = ConditionalNnx(nnx.Rngs(0))
    recalibrate_nnx(lambda model, x: model(x, LABELS), model, [x])
    close(model.norm.mean[...], (x @ model.first.kernel[...]).mean(0))
    model.eval()
    smaller, report = fold_nnx(model, x, LABELS)
    assert "gets scale or bias in its call" in str(report)
    close(smaller(x, LABELS), model(x, LABELS))


def test_mistakes_are_named():
    layer = bn_jax.layers.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"scale is given in the call.*use_scale=False"):
        layer(X, scale=np.ones(3))
    with pytest.raises(ValueError, match=r"bias is given in the call.*use_bias=False"):
        layer(X, bias=np.ones(3))
    with pytest.raises(ValueError, match=r"bias has shape \(5, 3\), but x has shape \(6, 2, 2, 3"):
        in_nnx(X, None, np.ones((5, 3)), evaluate=False)


def test_mistakes_are_named_in_equinox():
    layer, state = equinox_layer()
    with pytest.raises(ValueError, match=r"weight is given in the call.*channelwise_affine=False"):
        layer(X, state, weight=np.ones(3))
