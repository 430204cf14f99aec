"""What the recipes of .docs/recipes.md claim, beyond that they run (tests/test_readme.py).

Each test takes the code of some sections from the page.
"""

import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.layers.linen
import bn_jax.layers.nnx
from tests.layers.draws import normal

PAGE = Path(__file__).parents[2] / ".docs" / "recipes.md"
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lenient")]


def run(names, *titles, instead=("", "")):
    """Run the blocks of the page's beginning and of the sections with these titles."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    for title in ("", *titles):
        (section,) = [s for s in sections if s.startswith(title or "# Recipes")]
        for block in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            exec(compile(block.replace(*instead), title, "exec"), names)
    return names


@pytest.mark.parametrize("api", ["functional", "linen", "in_nnx"])
def test_three_switches_in_all_apis(api):
    chosen = "forward, evaluate, weights, stats = "
    names = run({}, "Three switches", instead=(f"{chosen}linen", chosen + api))
    forward, weights, stats, x = (names[n] for n in ("forward", "weights", "stats", "x"))
    compare = functools.partial(jax.tree.map, close)

    def loss(weights):
        return names["cross_entropy"](forward(weights, stats, x)[0])

    gradient = jax.grad(loss)(weights)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    perturbed = jax.tree.map(lambda w, g: w + 0.05 / norm * g, weights, gradient)
    sam, sam_stats = names["sam_gradients"](weights, stats)
    compare(sam, jax.grad(loss)(perturbed))
    compare(sam_stats, forward(weights, stats, x)[1])  # of the first pass, not of the second

    inner = names["adapted"](weights, x)
    outer = jax.grad(lambda weights: loss(names["adapted"](weights, x)))(weights)
    compare(names["meta_gradients"], outer)
    compare(names["meta_stats"], forward(inner, stats, x)[1])

    count = [leaf for leaf in jax.tree.leaves(names["both"]) if leaf.dtype == jnp.int32]
    if api == "functional":
        assert (count[0] == 2).all()
    compare(names["both"], forward(weights, forward(weights, stats, x)[1], x[::-1] * 2)[1])
    compare(names["on_real"], forward(weights, stats, x)[0])  # normalized by itself alone
    compare(names["target"], names["evaluate"](weights, stats, x))


WIDTHS = 3, 4


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for width in WIDTHS:
            x = nn.Dense(width, use_bias=False)(x)
            x = nn.relu(bn_jax.layers.linen.BatchNorm(not train)(x))
        return x


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.zeroth = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
        self.z_norm = bn_jax.layers.nnx.BatchNorm(3, rngs=rngs)  # first, and last by name
        self.first = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.a_norm = bn_jax.layers.nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.z_norm(self.zeroth(x)))
        return nnx.relu(self.a_norm(self.first(x)))


def blended_by_hand(x, kernels, means, variances, weight):
    x = np.float64(x)
    for kernel, mean, var in zip(kernels, means, variances, strict=True):
        x = x @ np.float64(kernel)
        mixed = weight * mean + (1 - weight) * x.mean(0)
        spread = weight * var + (1 - weight) * x.var(0)
        x = np.maximum((x - mixed) / np.sqrt(spread + 1e-5), 0)
    return x


def test_blends_reach_every_layer_in_its_order():
    names = run({}, "Test data that differ from the training data")
    x, weight = normal((16, 2), 1, 2), names["weight"]
    means = [normal((width,), 0, seed=width) for width in WIDTHS]
    variances = [1 + normal((width,), 0, seed=9) ** 2 for width in WIDTHS]

    variables = Linen().init(jax.random.key(0), x, train=False)
    values = zip(means, variances, strict=True)
    stats = {f"BatchNorm_{n}": {"mean": m, "var": v} for n, (m, v) in enumerate(values)}
    with nn.intercept_methods(names["blend"]):
        y = Linen().apply(variables | {"batch_stats": stats}, x, train=False)
    kernels = [variables["params"][f"Dense_{n}"]["kernel"] for n in range(2)]
    close(y, blended_by_hand(x, kernels, means, variances, weight))

    model = Nnx(nnx.Rngs(0))
    for layer, mean, var in zip((model.z_norm, model.a_norm), means, variances, strict=True):
        layer.mean[...], layer.var[...] = mean, var
    kernels = model.zeroth.kernel[...], model.first.kernel[...]
    y = names["with_blends"](model, weight)(x)
    close(y, blended_by_hand(x, kernels, means, variances, weight))
    close(model.z_norm.mean[...], means[0])  # the copy was moved, and not the model

    mixed = names["blended"](x, *bn_jax.init(2), weight)
    close(mixed, (x - (1 - weight) * x.mean(0)) / np.sqrt(weight + (1 - weight) * x.var(0) + 1e-5))
    z, state = names["z"], names["state"]
    pooled = np.concatenate([np.float64(z), np.ones((8, 16)), -np.ones((8, 16))])  # 16 of N(0, 1)
    assert (state.mean == 0).all()
    assert (state.var == 1).all()
    expected = (np.float64(z) - pooled.mean(0)) / np.sqrt(pooled.var(0) + 1e-5)
    joint = names["joint"]
    close(names["bn"].normalize(z, joint.mean, joint.var, names["norm"]), expected)


def test_tent_starts_again_when_it_collapses():
    """At a high learning rate, all examples soon have one label; scale and bias are reset."""
    names = run({}, "Test data that differ from the training data")
    saved, x = names["params"]["norm"], names["x"]
    run_tent = functools.partial(names["tent"], names["logits_of"], saved)
    seen = list(run_tent([x] * 4, names["optax"].adam(1e-3)))
    assert not np.allclose(seen[-1][0].scale, saved.scale)  # it trains, and nothing warns

    with pytest.warns(UserWarning, match="TENT starts again") as warned:
        seen = list(run_tent([x] * 60, names["optax"].adam(0.3)))
    resets = [all(map(jnp.array_equal, affine, saved)) for affine, _ in seen]
    assert sum(resets) == len(warned) > 0
    first = resets.index(True)
    assert len(np.unique(seen[first][1])) < len(np.unique(seen[0][1]))
    np.testing.assert_array_equal(seen[first + 1][1], seen[0][1])  # as at first
