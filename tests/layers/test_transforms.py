"""Under the transforms of jax, of linen and of nnx, and inside of a model."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax as bn
import bn_jax.layers.linen
import bn_jax.layers.nnx
from tests.devices import make_mesh
from tests.layers.draws import normal

KEY = jax.random.key(0)
X = normal((8, 5), 3, 2)
Linen, Nnx = bn_jax.layers.linen.BatchNorm, bn_jax.layers.nnx.BatchNorm
P = jax.sharding.PartitionSpec


def mesh(shape, names):
    return make_mesh(shape, names, (jax.sharding.AxisType.Auto,) * len(shape))


def waves(key, shape, dtype=jnp.float32, out_sharding=None):
    """Weights that compile in no time, unlike random ones."""
    return 0.3 * jnp.sin(jnp.arange(math.prod(shape), dtype=dtype)).reshape(shape)


def same(ours, theirs, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), ours, theirs)


class TestNamedAxes:
    """What is pooled equals the whole."""

    def whole(self):
        layer = Linen()
        variables = layer.init(KEY, X, True)
        return variables, layer.apply(variables, X, False, mutable=["batch_stats"])

    def test_linen_under_vmap(self):
        variables, (y, updates) = self.whole()
        layer = Linen(axis_name="shards")
        pooled, stats = jax.jit(
            jax.vmap(
                lambda x: layer.apply(variables, x, False, mutable=["batch_stats"]),
                axis_name="shards",
            )
        )(X.reshape(4, 2, 5))
        same(pooled.reshape(8, 5), y)
        same(jax.tree.map(lambda a: a[2], stats), updates)

    @pytest.mark.parametrize("axis_name", ["i", ("i", "j")])
    def test_linen_under_shard_map(self, axis_name):
        variables, (y, updates) = self.whole()
        layer = Linen(axis_name=axis_name)
        pooled, stats = jax.jit(
            jax.shard_map(
                lambda x: layer.apply(variables, x, False, mutable=["batch_stats"]),
                mesh=mesh((2, 2) if axis_name == ("i", "j") else (4,), tuple(axis_name)),
                in_specs=P(axis_name),
                out_specs=(P(axis_name), P()),  # the state is the same everywhere
            )
        )(X)
        same(pooled, y)
        same(stats, updates)

    def test_nnx_under_shard_map(self):
        """The recipe for JAX's own transforms: split outside, merge inside, return the state."""
        _, (y, updates) = self.whole()
        layer = Nnx(5, axis_name="shards", rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def member(params, rest, x):
            inside = nnx.merge(graph, params, rest, copy=True)
            return inside(x), nnx.state(inside, nnx.BatchStat)

        pooled, stats = jax.jit(
            jax.shard_map(
                member,
                mesh=mesh((4,), ("shards",)),
                in_specs=(P(), P(), P("shards")),
                out_specs=(P("shards"), P()),
            )
        )(params, rest, X)
        nnx.update(layer, stats)
        same(pooled, y)
        same(layer.mean[...], updates["batch_stats"]["mean"])
        same(layer.var[...], updates["batch_stats"]["var"])

    def test_evaluation_needs_no_axis(self):
        variables, _ = self.whole()
        y = Linen(axis_name="shards").apply(variables, X, True)
        np.testing.assert_array_equal(y, Linen().apply(variables, X, True))


class TestLinenTransforms:
    def test_jit_does_not_retrace(self):
        traces = []

        @jax.jit
        def step(variables, x):
            traces.append(None)
            return Linen().apply(variables, x, False, mutable=["batch_stats"])

        variables = Linen().init(KEY, X, True)
        eager = Linen().apply(variables, X, False, mutable=["batch_stats"])
        same(step(variables, X), eager)
        step(variables | eager[1], X)
        assert len(traces) == 1

    def test_eval_shape_and_jitted_initialization(self):
        shapes = jax.eval_shape(lambda key: Linen().init(key, X, False), KEY)
        variables = jax.jit(lambda key: Linen().init(key, X, False))(KEY)
        assert jax.tree.structure(shapes) == jax.tree.structure(variables)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
            lambda a: (a.shape, a.dtype), variables
        )

    def test_vmap_of_independent_members(self):
        x = jnp.stack([X, 2 * X, X - 5])
        members = nn.vmap(
            Linen,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        )(use_running_average=False, average=bn.DebiasedEma(0.9))
        variables = members.init(KEY, x)
        y, updates = members.apply(variables, x, mutable=["batch_stats"])
        assert updates["batch_stats"]["count"].shape == (3, 5)
        for i in range(3):
            layer = Linen(average=bn.DebiasedEma(0.9))
            one = jax.tree.map(lambda a, i=i: a[i], variables)
            same(y[i], layer.apply(one, x[i], False, mutable=["batch_stats"])[0])
        same(updates["batch_stats"]["mean"], x.mean(1))

    def test_scan_over_layers(self):
        class Block(nn.Module):
            norm: type = Linen

            @nn.compact
            def __call__(self, x, _):
                x = nn.Dense(5, kernel_init=waves)(x)
                return self.norm(use_running_average=False, use_fast_variance=False)(x), None

        def deep(norm):
            return nn.scan(
                Block,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )(norm)

        variables = jax.jit(lambda: deep(Linen).init(KEY, X, None))()
        ours, theirs = (
            jax.jit(lambda v, norm=norm: deep(norm).apply(v, X, None, mutable=["batch_stats"]))(
                variables
            )
            for norm in (Linen, nn.BatchNorm)
        )
        same(ours[0][0], theirs[0][0], atol=1e-5)
        same(ours[1], theirs[1], atol=1e-5)

    def test_scan_over_steps_carries_the_statistics(self):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, carry, x):
                return carry, Linen(False, average=bn.CumulativeAverage())(x)

        steps = nn.scan(
            Step,
            variable_broadcast="params",
            variable_carry="batch_stats",
            split_rngs={"params": False},
        )()
        batches = jnp.stack([X, 2 * X, 3 * X])
        variables = Step().init(KEY, None, X)
        _, updates = steps.apply(variables, None, batches, mutable=["batch_stats"])
        stats = updates["batch_stats"]["BatchNorm_0"]
        same(stats["mean"], 2 * X.mean(0), atol=1e-5)
        assert (stats["count"] == 3).all()

    def test_remat(self):
        def gradient(norm):
            layer = norm(use_running_average=False)
            variables = layer.init(KEY, X)

            def loss(params, x):
                y, updates = layer.apply(variables | {"params": params}, x, mutable=["batch_stats"])
                return jnp.sum(jnp.sin(y)), updates

            return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], X)

        same(gradient(nn.remat(Linen)), gradient(Linen))


class TestNnxTransforms:
    def layer(self, **settings):
        return Nnx(5, rngs=nnx.Rngs(0), **settings)

    def test_jit_updates_and_does_not_retrace(self):
        traces = []

        @nnx.jit
        def step(layer, x):
            traces.append(None)
            return layer(x)

        layer, eager = (self.layer(average=bn.DebiasedEma(0.9)) for _ in range(2))
        for _ in range(3):
            same(step(layer, X), eager(X))
        same(layer.mean[...], eager.mean[...])
        assert (layer.count[...] == 3).all()
        assert len(traces) == 1

    def test_grad_gives_parameters_and_updates_statistics(self, graph_mode):
        layer, eager = self.layer(), self.layer()
        grads = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X))))(layer)
        eager(X)
        assert set(nnx.to_pure_dict(grads)) == {"scale", "bias"}
        same(layer.mean[...], eager.mean[...])
        assert layer.mean[...].any()

    def test_vmap_of_independent_members(self):
        x = jnp.stack([X, 2 * X, X - 5])

        @nnx.vmap
        def make(key):
            return Nnx(5, momentum=0.0, rngs=nnx.Rngs(params=key))

        members = make(jax.random.split(KEY, 3))
        y = nnx.vmap(lambda layer, x: layer(x))(members, x)
        same(members.mean[...], x.mean(1))
        for i in range(3):
            same(y[i], self.layer()(x[i]))

    def test_vmap_of_examples(self, graph_mode):
        layer = self.layer(axis_name="examples", momentum=0.0)
        state_axes = nnx.StateAxes({...: None})
        y = nnx.vmap(lambda layer, x: layer(x), in_axes=(state_axes, 0), axis_name="examples")(
            layer, X
        )
        same(y, self.layer()(X))
        same(layer.mean[...], X.mean(0))

    def test_vmap_of_a_shared_layer_needs_an_axis_for_its_statistics(self, graph_mode):
        x = jnp.stack([X, 2 * X])
        with pytest.raises(ValueError, match="out_axes"):
            nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(self.layer(), x)
        axes = nnx.StateAxes({nnx.BatchStat: 0, ...: None})
        layer = nnx.vmap(self.layer, out_axes=axes, axis_size=2)()
        assert layer.scale.shape == (5,)
        y = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0))(layer, x)
        same(y[1], self.layer()(x[1]))
        same(layer.mean[...], 0.01 * x.mean(1))

    def test_split_and_merge(self):
        layer = self.layer()
        graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
        again = nnx.merge(graph, params, stats)
        np.testing.assert_array_equal(again(X), layer(X))
        np.testing.assert_array_equal(again.mean[...], layer.mean[...])
        assert hash(graph) == hash(nnx.split(self.layer(), nnx.Param, nnx.BatchStat)[0])

    def test_inside_of_jax_grad(self, graph_mode):
        layer, eager = self.layer(), self.layer()
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params, x):
            inside = nnx.merge(graph, params, rest, copy=True)
            return jnp.sum(jnp.sin(inside(x))), nnx.state(inside, nnx.BatchStat)

        grads, stats = jax.grad(loss, has_aux=True)(params, X)
        nnx.update(layer, stats)
        expected = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X))))(eager)
        same(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected))
        same(layer.mean[...], eager.mean[...])

    def test_scan_over_layers(self):
        @nnx.vmap
        def make(key):
            return Nnx(5, rngs=nnx.Rngs(params=key))

        layers = make(jax.random.split(KEY, 3))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(jnp.tanh(x))

        y = forward(X, layers)
        x = X
        for _ in range(3):
            layer = self.layer()
            x = layer(jnp.tanh(x))
        same(y, x, atol=1e-5)
        same(layers.mean[...][2], layer.mean[...])

    def test_remat(self, graph_mode):
        layer, plain = self.layer(), self.layer()

        def loss(layer, x):
            return jnp.sum(jnp.sin(nnx.remat(lambda layer, x: layer(x))(layer, x)))

        grads = nnx.grad(loss)(layer, X)
        expected = nnx.grad(lambda layer, x: jnp.sum(jnp.sin(layer(x))))(plain, X)
        same(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected))
        same(layer.mean[...], plain.mean[...])


class TestNnxUnderJaxTransforms:
    """The README's recipe: split outside, merge inside, and carry the statistics out."""

    def parts(self):
        layer = Nnx(5, momentum=0.9, rngs=nnx.Rngs(0))
        graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

        def forward(params, stats, x):
            model = nnx.merge(graph, params, stats, copy=True)
            return model(x), nnx.state(model, nnx.BatchStat)

        return forward, params, stats, layer

    def test_jit(self):
        forward, params, stats, layer = self.parts()
        y, new = jax.jit(forward)(params, stats, X)
        same(y, layer(X))
        same(nnx.to_pure_dict(new), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)))

    def test_vmap(self):
        forward, params, stats, _ = self.parts()
        members = jnp.stack([X, 2 * X + 1])
        y, new = jax.vmap(forward, (None, None, 0))(params, stats, members)
        for n, x in enumerate(members):
            layer = self.parts()[3]
            same(y[n], layer(x))
            same(nnx.to_pure_dict(new)["var"][n], layer.var[...])

    def test_checkpoint(self):
        forward, params, stats, _ = self.parts()

        def loss(run):
            return lambda x: jnp.sin(run(params, stats, x)[0]).sum()

        same(jax.grad(loss(jax.checkpoint(forward)))(X), jax.grad(loss(forward))(X))

    def test_scan(self):
        forward, params, stats, layer = self.parts()
        batches = jnp.stack([X, 2 * X + 1, X - 3])

        def step(stats, x):
            y, stats = forward(params, stats, x)
            return stats, y

        last, ys = jax.lax.scan(step, stats, batches)
        for y, x in zip(ys, batches, strict=True):
            same(y, layer(x))
        nnx.update(layer, last)
        again = self.parts()[3]
        for x in batches:
            again(x)
        same(layer.mean[...], again.mean[...])
        same(layer.var[...], again.var[...])

    def test_eval_shape(self):
        shapes = nnx.eval_shape(lambda: Nnx(5, rngs=nnx.Rngs(0)))
        assert type(shapes) is Nnx
        assert shapes.mean.get_value() == jax.ShapeDtypeStruct((5,), jnp.float32)

    def test_bridge_to_linen_and_back(self):
        """As one layer of a linen module, and a linen layer as a module of nnx."""
        wrapped = nnx.bridge.ToLinen(Nnx, args=(5,), kwargs={"momentum": 0.9})
        variables = wrapped.init(jax.random.key(0), X)
        y, updates = wrapped.apply(variables, X, mutable=["batch_stats"])
        layer = self.parts()[3]
        layer(X)  # as initialization did
        same(y, layer(X))
        assert set(updates["batch_stats"]) == {"mean", "var"}

        linen = nnx.bridge.ToNNX(Linen(use_running_average=False, momentum=0.9), nnx.Rngs(0))
        linen.lazy_init(X)
        y = linen(X, mutable=["batch_stats"])
        same(y, self.parts()[3](X))


class TestConvolutionalNetwork:
    """A network of flax's documentation's form gives the same logits with either layer."""

    images = jax.random.uniform(KEY, (8, 8, 8, 1))

    def test_linen(self, flax_rules):
        class Network(nn.Module):
            norm: type

            @nn.compact
            def __call__(self, x, train):
                for features in (8, 16):
                    x = nn.Conv(features, (3, 3), use_bias=False, kernel_init=waves)(x)
                    x = self.norm(use_running_average=not train, use_fast_variance=False)(x)
                    x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
                x = x.reshape(x.shape[0], -1)
                return nn.Dense(10, kernel_init=waves)(x)

        with flax_rules():
            ours, theirs = Network(Linen), Network(nn.BatchNorm)
            variables = theirs.init(KEY, self.images, True)
            results = []
            for network in (ours, theirs):
                apply = jax.jit(network.apply, static_argnums=2, static_argnames="mutable")
                logits, updates = apply(variables, self.images, True, mutable=("batch_stats",))
                results.append((logits, apply(variables | updates, self.images, False)))
        same(*results, atol=1e-5)

    def test_nnx(self, flax_rules):
        class Network(nnx.Module):
            def __init__(self, norm, rngs):
                self.conv1 = nnx.Conv(1, 8, (3, 3), use_bias=False, kernel_init=waves, rngs=rngs)
                self.norm1 = norm(8, use_fast_variance=False, rngs=rngs)
                self.conv2 = nnx.Conv(8, 16, (3, 3), use_bias=False, kernel_init=waves, rngs=rngs)
                self.norm2 = norm(16, use_fast_variance=False, rngs=rngs)
                self.dense = nnx.Linear(64, 10, kernel_init=waves, rngs=rngs)

            def __call__(self, x):
                for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
                    x = nnx.avg_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
                return self.dense(x.reshape(x.shape[0], -1))

        with flax_rules():
            results = []
            for norm in (Nnx, nnx.BatchNorm):
                network = Network(norm, nnx.Rngs(0))
                call = nnx.jit(lambda network, x: network(x))
                trained = call(network, self.images)
                network.eval()
                results.append((trained, call(network, self.images)))
        same(*results, atol=1e-5)
