"""A batch of one in training: what flax computes, and a warning."""

import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.layers import SingleValueWarning
from bn_jax.layers.single_value import warn
from tests.layers.draws import normal

KEY = jax.random.key(0)
X = normal((1, 3), 2)
Linen, Nnx = bn_jax.layers.linen.BatchNorm, bn_jax.layers.nnx.BatchNorm


def linen(norm):
    """Y and statistics after one step of flax.linen."""
    variables = norm().init(KEY, X, False)
    variables["params"]["bias"] += 0.5
    y, updates = norm().apply(variables, X, False, mutable=["batch_stats"])
    return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"]


def of_nnx(norm):
    """The same of flax.nnx."""
    layer = norm(3, rngs=nnx.Rngs(0))
    layer.bias[...] += 0.5
    return layer(X), layer.mean[...], layer.var[...]


@pytest.mark.parametrize(
    ("step", "ours", "theirs"), [(linen, Linen, nn.BatchNorm), (of_nnx, Nnx, nnx.BatchNorm)]
)
def test_it_is_computed_as_in_flax(step, ours, theirs, flax_rules, close):
    with pytest.warns(SingleValueWarning, match="use_running_average=True"):
        mine = step(ours)
    with flax_rules():
        jax.tree.map(close, mine, step(theirs))
    np.testing.assert_array_equal(mine[0], 0.5 + jnp.zeros_like(X))
    np.testing.assert_allclose(mine[2], 0.99, rtol=1e-6)  # towards a variance of 0


def test_it_warns_once_and_can_be_made_an_error():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", SingleValueWarning)
        for _ in range(3):
            warn("of one shape")
    assert [warning.category for warning in caught] == [SingleValueWarning]
    layer = Nnx(3, rngs=nnx.Rngs(0))
    for step in layer, partial(nnx.jit(lambda layer, x: layer(x)), layer):
        with pytest.raises(SingleValueWarning):  # as these tests make all warnings errors
            step(X)


class Block(nnx.Module):
    """A model of the user's, with the layer on one line."""

    def __init__(self):
        self.norm = Nnx(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


def own_line(step):
    """The line of this file, if the warning names it, that a step is warned at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SingleValueWarning)
        step()
    (warning,) = caught
    assert warning.filename == __file__
    return warning.lineno


def test_it_names_the_line_that_calls_the_layer():
    variables = Linen().init(KEY, X, True)
    layer, block = Nnx(3, rngs=nnx.Rngs(0)), Block()
    apply = jax.jit(lambda x: Linen().apply(variables, x, False, mutable=["batch_stats"]))
    steps = [
        lambda: layer(X),
        lambda: nnx.jit(lambda layer, x: layer(x))(layer, X),
        lambda: Linen().apply(variables, X, False, mutable=["batch_stats"]),
        lambda: apply(X),
    ]
    assert [own_line(step) for step in steps] == [s.__code__.co_firstlineno for s in steps]
    assert own_line(lambda: block(X)) == Block.__call__.__code__.co_firstlineno + 1


def test_a_group_of_one():
    layer = Nnx(3, rngs=nnx.Rngs(0), group_size=2)
    with pytest.warns(SingleValueWarning, match="group_size=2"):
        y = layer(jnp.arange(9.0).reshape(3, 3))
    np.testing.assert_array_equal(y[-1], jnp.zeros(3))


class TestShapes:
    """One example is enough to ask for shapes."""

    def test_eval_shape(self):
        init = lambda: Linen(use_running_average=False).init(KEY, X)  # noqa: E731
        assert jax.eval_shape(init)["batch_stats"]["mean"].shape == (3,)
        layer = Nnx(3, rngs=nnx.Rngs(0))
        assert nnx.eval_shape(lambda layer: layer(X), layer).shape == X.shape

    def test_tabulate(self, lenient):
        layer = Nnx(3, rngs=nnx.Rngs(0))
        with warnings.catch_warnings(action="ignore"):  # it compiles, so it may warn
            assert "BatchStat" in nnx.tabulate(layer, X, compute_flops=True)
            assert "BatchNorm" in Linen(False).tabulate(KEY, X, compute_flops=True)
        assert layer(jnp.concatenate([X, 2 * X])).shape == (2, 3)  # nnx is as it was

    def test_bridge(self):
        with warnings.catch_warnings(action="ignore"):
            variables = nnx.bridge.to_linen(Nnx, 3).init(KEY, X)
        assert set(variables["params"]) == {"scale", "bias"}
