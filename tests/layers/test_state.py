"""What the layers remember: later averages, loaded statistics, half precision, momenta, counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bn_jax as bn
import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.layers.swap import swap

KEY = jax.random.key(0)
X = 5 + jax.random.normal(KEY, (8, 3))
Linen, Nnx = bn_jax.layers.linen.BatchNorm, bn_jax.layers.nnx.BatchNorm
DEBIASED = bn.DebiasedEma(0.9)


def make(norm=Nnx, **settings):
    return norm(3, rngs=nnx.Rngs(0), **settings)


def train(layer, variables, x=X):
    """One step of linen."""
    return variables | layer.apply(variables, x, False, mutable=["batch_stats"])[1]


class TestALaterAverage:
    """Set after construction, an nnx layer's average gets the count it needs."""

    def set_attribute(self):
        layer = make()
        layer.average = DEBIASED
        return layer

    def set_attributes(self):
        model = nnx.Sequential(make())
        model.set_attributes(nnx.BatchNorm, average=DEBIASED)
        return model.layers[0]

    def after_swap(self):
        layer = make(nnx.BatchNorm)
        swap(layer)
        layer.average = DEBIASED
        return layer

    @pytest.mark.parametrize("how", ["set_attribute", "set_attributes", "after_swap"])
    def test_is_as_one_from_the_start(self, how):
        late, early = getattr(self, how)(), make(average=DEBIASED)
        assert nnx.graphdef(late) == nnx.graphdef(early)
        for batch in X, 3 * X:
            late(batch), early(batch)
        assert (late.count[...] == 2).all()
        jax.tree.map(np.testing.assert_array_equal, nnx.state(late), nnx.state(early))

    def test_keeps_what_was_learned(self):
        layer = make(momentum=0.0)
        layer(X)
        before = layer.mean[...]
        layer.average = bn.CumulativeAverage()
        layer(X + 100)
        np.testing.assert_allclose(layer.mean[...], before, atol=0.2)  # one of 1001 batches

    def test_may_go_and_come_back(self):
        layer = make(average=DEBIASED)
        layer(X)
        layer.average = None
        layer(X)
        layer.average = DEBIASED
        layer(X)
        assert (layer.count[...] == 3).all()


class TestLoadedStatistics:
    """Of a checkpoint of flax's, which counts nothing: they are not wiped by the first step."""

    def test_linen(self):
        plain = Linen().init(KEY, X, True)
        plain["batch_stats"]["mean"] += 5
        updated = train(Linen(average=DEBIASED), plain, X - 5)
        np.testing.assert_allclose(updated["batch_stats"]["mean"], 4.5, atol=0.2)

    def test_nnx(self):
        layer, flax_layer = make(average=DEBIASED), make()
        flax_layer.mean[...] += 5
        nnx.update(layer, nnx.state(flax_layer))
        layer(X - 5)
        np.testing.assert_allclose(layer.mean[...], 4.5, atol=0.2)


class TestHalfPrecision:
    """Statistics cast to half precision are float32 from the first step on, as in flax.linen."""

    def test_linen(self):
        variables = Linen().init(KEY, X, True)  # 0 and 1, which half precision holds
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
        stats, expected = (train(Linen(), v)["batch_stats"] for v in (half, variables))
        assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}
        jax.tree.map(np.testing.assert_array_equal, stats, expected)

    def test_nnx(self):
        layer = make(average=DEBIASED)
        half = lambda a: a.astype(jnp.bfloat16)  # noqa: E731
        nnx.update(layer, jax.tree.map(half, nnx.state(layer, nnx.BatchStat)))
        layer.mean.set_value(jnp.full(3, 5, jnp.bfloat16))
        step = nnx.jit(lambda layer, x: layer(x))
        for _ in range(300):
            step(layer, X)
        assert layer.mean[...].dtype == layer.var[...].dtype == layer.count[...].dtype == "float32"
        np.testing.assert_allclose(layer.mean[...], X.mean(0), rtol=1e-4)


MOMENTA = {
    "array": jnp.float32(0.9),
    "numpy": np.float32(0.9),
    "per feature": np.array([0.9, 0.5, 0.0], np.float32),
}


@pytest.mark.parametrize("momentum", MOMENTA.values(), ids=MOMENTA)
def test_momentum_as_in_flax(momentum, lenient, close):
    size = float(jnp.abs(X).max())
    linen = [
        train(norm(momentum=momentum), Linen().init(KEY, X, True))["batch_stats"]
        for norm in (Linen, nn.BatchNorm)
    ]
    jax.tree.map(lambda a, b: close(a, b, size=size), *linen)
    layer = make(momentum=momentum)
    layer(X)
    close(layer.mean[...], linen[1]["mean"], size=size)


def test_momentum_may_be_swept(lenient, close):
    variables = Linen().init(KEY, X, True)
    momenta = jnp.array([0.9, 0.5])

    def means(norm):
        step = lambda m: train(norm(momentum=m), variables)["batch_stats"]["mean"]  # noqa: E731
        return jax.vmap(step)(momenta)

    close(means(Linen), means(nn.BatchNorm), size=float(jnp.abs(X).max()))


@pytest.mark.parametrize("norm", [Nnx, nnx.BatchNorm], ids=["ours", "flax"])
def test_momentum_may_be_annealed(norm, lenient):
    """By a variable of the layer, or by an attribute that a jitted step sets."""
    layer = make(norm, momentum=nnx.Variable(jnp.float32(0.9)))
    step = nnx.jit(lambda layer, x: layer(x))
    step(layer, X)
    first = layer.mean[...]
    layer.momentum[...] = 1.0
    step(layer, X + 1)
    np.testing.assert_array_equal(layer.mean[...], first)

    @nnx.jit
    def anneal(layer, x, momentum):
        layer.momentum = momentum
        layer(x)
        layer.momentum = 0.99

    layer = make(norm)
    anneal(layer, X, 0.9)
    np.testing.assert_allclose(layer.mean[...], first, rtol=1e-6)


class TestCount:
    """A float, so that whole states can be averaged, carried and differentiated."""

    def test_under_an_average_of_the_whole_state_in_a_scan(self):
        layer = Linen(average=DEBIASED)
        variables = layer.init(KEY, X, True)
        ema = optax.tree.zeros_like(variables)

        def step(carry, x):
            variables, ema = carry
            variables = train(layer, variables, x)
            ema = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, ema, variables)
            return (variables, ema), None

        (variables, ema), _ = jax.lax.scan(step, (variables, ema), jnp.stack([X, X]))
        assert (variables["batch_stats"]["count"] == 2).all()
        assert (ema["batch_stats"]["count"] == 1.25).all()
        y = layer.apply(ema, X, True)
        train(layer, ema)
        assert jnp.isfinite(y).all()

    @pytest.mark.skipif("graph" not in nnx.grad.__code__.co_varnames, reason="no tree mode")
    def test_in_the_gradient_of_a_tree(self):
        layer = make(average=DEBIASED)
        gradient = nnx.grad(lambda layer, x: (layer(x) ** 2 * x).sum(), graph=False)(layer, X)
        assert jnp.any(gradient.scale[...] != 0)
        assert not gradient.count[...].any()

    def test_of_integers_from_a_checkpoint_goes_on(self):
        layer = Linen(average=DEBIASED)
        variables = train(layer, layer.init(KEY, X, True))
        stats = variables["batch_stats"]
        whole = variables | {"batch_stats": stats | {"count": stats["count"].astype(jnp.int32)}}
        ours, theirs = (train(layer, v, 2 * X)["batch_stats"] for v in (variables, whole))
        assert theirs["count"].tolist() == [2, 2, 2]
        np.testing.assert_array_equal(ours["mean"], theirs["mean"])
