"""How the shells read a mask: flax's masks mean what they mean in flax, and there are weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.layers.translate import read_mask
from tests.layers.draws import normal

KEY = jax.random.key(0)
X = normal((6, 4, 5, 3), 1)


def linen(x, mask, norm=bn_jax.layers.linen.BatchNorm):
    layer = norm(momentum=0.0, use_fast_variance=False)
    variables = layer.init(KEY, x, True)
    y, updates = layer.apply(variables, x, False, mask=mask, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def through_nnx(x, mask):
    layer = bn_jax.layers.nnx.BatchNorm(x.shape[-1], momentum=0.0, rngs=nnx.Rngs(0))
    y = layer(x, mask=mask)
    return y, {"mean": layer.mean[...], "var": layer.var[...]}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((6, 4, 5, 3), bool),
        ((6, 4, 5, 1), bool),
        ((6, 1, 1, 1), jnp.int32),
        ((4, 5, 1), bool),
        ((5, 1), jnp.int32),
    ],
)
@pytest.mark.parametrize("ours", [linen, through_nnx])
def test_masks_of_flax(ours, shape, dtype, flax_rules, close):
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, shape).astype(dtype)
    y, stats = ours(X, mask)
    with flax_rules():
        y_theirs, theirs = linen(X, mask, nn.BatchNorm)
    close(y, y_theirs, size=4 * float(jnp.abs(X).max()))
    close(stats["mean"], theirs["mean"], size=float(jnp.abs(X).max()))
    close(stats["var"], theirs["var"])


@pytest.mark.parametrize("ours", [linen, through_nnx])
def test_one_value_per_example(ours):
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (6, 4, 5))
    jax.tree.map(np.testing.assert_array_equal, ours(X, mask), ours(X, mask[..., None]))


@pytest.mark.parametrize("ours", [linen, through_nnx])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_a_weight_of_k_is_k_copies(ours, dtype, close):
    weights = jnp.array([2, 0, 1, 3, 1, 0], dtype)
    repeated = jnp.repeat(X, np.array([2, 0, 1, 3, 1, 0]), axis=0)
    _, weighted = ours(X, weights[:, None, None, None])
    _, copied = ours(repeated, None)
    close(weighted["mean"], copied["mean"], size=float(jnp.abs(X).max()))
    close(weighted["var"], copied["var"])


def test_an_ambiguous_mask_is_refused():
    x = X.reshape(60, 6)[:6]
    with pytest.raises(ValueError, match=r"in two ways.*mask.reshape\(\(6, 1\)\)"):
        linen(x, jnp.ones(6, bool))
    linen(x[:5], jnp.ones(5, bool))  # per example
    linen(x[:5], jnp.ones(6, bool))  # per feature, as flax reads it
    linen(x, jnp.ones(1, bool))  # the same both ways


def test_ambiguity_depends_on_the_feature_axis():
    x, mask = jnp.ones((3, 3, 3)), jnp.ones((3, 3), bool)
    assert read_mask(mask, x, (0,)).size == 9  # (1, 3, 3) in either reading
    for axes, shape in [((1,), r"\(3, 1, 3\)"), ((2,), r"\(3, 3, 1\)")]:
        with pytest.raises(ValueError, match=rf"mask.reshape\({shape}\)"):
            read_mask(mask, x, axes)


def test_a_mask_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match=r"where has shape \(7,\)"):
        linen(X, jnp.ones(7, bool))
    with pytest.raises(ValueError, match="where has shape"):
        linen(X, jnp.ones((1, *X.shape), bool))


def test_the_feature_axes_are_left_out_wherever_they_are():
    x = jnp.ones((2, 3, 4, 5))
    assert read_mask(jnp.ones((2, 4, 5)), x, (1,)).shape == (2, 4, 5)
    assert read_mask(jnp.ones((3, 4)), x, (0, 3)).shape == (3, 4)
    assert read_mask(jnp.ones(()), x, (1,)).shape == (1, 1, 1, 1)
    assert read_mask(jnp.ones((3, 1, 5)), x, (1,)).shape == (1, 3, 1, 5)
    # Where the feature axis comes first, both readings are one.
    assert read_mask(jnp.ones((3, 4, 5)), x, (0,)).size == 60
