"""What is wrong with flax's own layers, shown in the flax that is installed, and what we do.

If flax mends a defect, the half that shows it fails, since the README's table must then change.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax as bn
import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.layers import SingleValueWarning
from tests.devices import make_mesh
from tests.layers.draws import normal

KEY = jax.random.key(0)
Ours, Theirs = bn_jax.layers.linen.BatchNorm, nn.BatchNorm
OursNnx, TheirsNnx = bn_jax.layers.nnx.BatchNorm, nnx.BatchNorm


def start(norm, x, **settings):
    layer = norm(**settings)
    return layer, layer.init(KEY, x[:2], use_running_average=True)


@functools.partial(jax.jit, static_argnums=0)
def step(layer, variables, x, mask=None):
    return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"], mask=mask)


def stats_after(norm, *batches, mask=None, **settings):
    layer, variables = start(norm, batches[0], **settings)
    for x in batches:
        _, updates = step(layer, variables, x, mask)
        variables = variables | updates
    return variables["batch_stats"]


def test_a_mended_defect_is_reported(flax_still):
    flax_still("0 (still there)", True)
    with pytest.raises(pytest.fail.Exception, match=r"has mended defect 1 .*README's table"):
        flax_still("1 (large mean)", False)


class TestLargeMean:
    """Defect 1: E[x²] - E[x]² in float32."""

    x = normal((64, 4), 1e4)

    def test_flax(self, flax_rules, flax_still):
        with flax_rules():
            y, _ = step(*start(Theirs, self.x), self.x)
            y_nnx = TheirsNnx(4, rngs=nnx.Rngs(0))(self.x)
        errors = [float(jnp.abs(y.std(0) - 1).max()) for y in (y, y_nnx)]
        flax_still("1 (large mean)", min(errors) > 0.1)

    def test_ours(self):
        y, _ = step(*start(Ours, self.x), self.x)
        y_nnx = OursNnx(4, rngs=nnx.Rngs(0))(self.x)
        exact = np.asarray(self.x, np.float64)
        exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
        np.testing.assert_allclose(y, exact, atol=1e-5)
        np.testing.assert_allclose(y_nnx, exact, atol=1e-5)


class TestEarlyEvaluation:
    """Defect 3: the initial variance of one is forgotten only slowly (google/flax#1360)."""

    x = normal((256, 4), spread=0.1)

    def std_at_evaluation(self, norm, **settings):
        layer, variables = start(norm, self.x, momentum=0.99, **settings)
        _, updates = step(layer, variables, self.x)
        return float(layer.apply(variables | updates, self.x, True).std())

    def test_flax(self, flax_rules, flax_still):
        with flax_rules():
            std = self.std_at_evaluation(Theirs)
        flax_still("3 (no bias correction)", std < 0.2)

    def test_ours_when_asked(self):
        # epsilon = 1e-5 of a variance of 0.01.
        std = self.std_at_evaluation(Ours, average=bn.DebiasedEma(0.99))
        assert abs(std - 1) < 1e-3

    def test_ours_by_default_is_flax(self, flax_rules):
        with flax_rules():
            std = self.std_at_evaluation(Theirs, use_fast_variance=False)
        assert abs(self.std_at_evaluation(Ours) - std) < 1e-6


class TestMaskAndAxisName:
    """Defect 5: a mean of means, whatever the counts (google/flax#2417)."""

    x = normal((4, 8, 3), np.arange(4).reshape(4, 1, 1))
    mask = jnp.asarray(np.arange(8) < np.array([[8], [1], [3], [0]]))

    def pooled(self, norm, shards=4):
        layer, variables = start(norm, self.x[0], momentum=0.0, axis_name="shards")

        def member(x, mask):
            return step(layer, variables, x, mask[:, None])[1]["batch_stats"]

        pooled = jax.jit(jax.vmap(member, axis_name="shards"))
        stats = pooled(self.x[:shards], self.mask[:shards])
        return jax.tree.map(lambda a: a[0], stats)

    @pytest.mark.parametrize("shards", [3, 4])  # uneven; and one empty
    def test_flax(self, shards, flax_rules, flax_still):
        kept = self.x[:shards][self.mask[:shards]]
        with flax_rules():
            stats = self.pooled(Theirs, shards)
        flax_still(
            "5 (mask and axis_name)", not np.allclose(stats["mean"], kept.mean(0), atol=1e-2)
        )

    @pytest.mark.parametrize("shards", [3, 4])
    def test_ours(self, shards):
        kept = np.asarray(self.x[:shards][self.mask[:shards]])
        stats = self.pooled(Ours, shards)
        np.testing.assert_allclose(stats["mean"], kept.mean(0), atol=1e-5)
        np.testing.assert_allclose(stats["var"], kept.var(0), rtol=1e-5)

    def test_ours_on_devices(self):
        layer, variables = start(Ours, self.x[0], momentum=0.0, axis_name="shards")
        mesh = make_mesh((4,), ("shards",), (jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec

        def member(x, mask):
            return step(layer, variables, x[0], mask[0][:, None])[1]["batch_stats"]

        stats = jax.jit(
            jax.shard_map(
                member, mesh=mesh, in_specs=(spec("shards"), spec("shards")), out_specs=spec()
            )
        )(self.x, self.mask)
        kept = np.asarray(self.x[self.mask])
        np.testing.assert_allclose(stats["mean"], kept.mean(0), atol=1e-5)
        np.testing.assert_allclose(stats["var"], kept.var(0), rtol=1e-5)


class TestNanInPadding:
    """Defect 6: NaN in what is masked out reaches the gradient (jax-ml/jax#26328)."""

    mask = jnp.asarray(np.arange(8)[:, None] < 6)
    x = normal((8, 3), np.where(mask, 0, np.nan))

    def gradient(self, norm, x, mask):
        layer, variables = start(norm, x)

        def loss(params, x):
            y, _ = step(layer, variables | {"params": params}, x, mask)
            return jnp.sum(jnp.where(mask, jnp.cos(y), 0.0))

        return jax.jit(jax.grad(loss, (0, 1)))(variables["params"], x)

    def test_flax(self, flax_rules, flax_still):
        with flax_rules():
            gradients = self.gradient(Theirs, self.x, self.mask)
        poisoned = [not jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)]
        flax_still("6 (NaN in padding)", any(poisoned))

    def test_ours(self):
        params, x = self.gradient(Ours, self.x, self.mask)
        params_without, x_without = self.gradient(Ours, self.x[:6], self.mask[:6])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, params_without
        )
        np.testing.assert_allclose(x[:6], x_without, atol=1e-5)
        assert not x[6:].any()

    def test_ours_in_nnx(self):
        def loss(layer, x):
            return jnp.sum(jnp.where(self.mask, jnp.cos(layer(x, mask=self.mask)), 0.0))

        layer = OursNnx(3, rngs=nnx.Rngs(0))
        gradients = nnx.grad(loss, argnums=(0, 1))(layer, self.x)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
        assert jnp.isfinite(layer.mean[...]).all()


class TestFullyMasked:
    """Defect 7: an empty batch poisons the running statistics."""

    x = normal((8, 3))
    mask = jnp.asarray(np.zeros((8, 1), bool))

    def test_flax(self, flax_rules, flax_still):
        with flax_rules():
            stats = stats_after(Theirs, self.x, mask=self.mask)
        flax_still("7 (fully masked batch)", jnp.isnan(stats["mean"]).all())

    def test_ours(self):
        stats = stats_after(Ours, self.x, mask=self.mask, average=bn.DebiasedEma(0.9))
        assert not stats["mean"].any()
        assert (stats["var"] == 1).all()
        assert not stats["count"].any()

    def test_ours_in_nnx(self):
        layer = OursNnx(3, rngs=nnx.Rngs(0))
        layer(self.x, mask=self.mask)
        assert not layer.mean[...].any()
        assert (layer.var[...] == 1).all()


class TestOneBadBatch:
    """Defect 8: one NaN, and the running statistics are NaN for good."""

    good = normal((8, 3))
    bad = normal((8, 3), np.where(np.arange(24).reshape(8, 3) == 1, np.nan, 0))

    def test_flax(self, flax_rules, flax_still):
        with flax_rules():
            stats = stats_after(Theirs, self.bad, self.good, self.good)
        flax_still("8 (NaN in one batch)", jnp.isnan(stats["mean"][1]))

    def test_ours_skips_that_feature_of_that_batch(self):
        stats = stats_after(Ours, self.good, self.bad, self.good)
        thrice = stats_after(Ours, self.good, self.good, self.good)
        twice = stats_after(Ours, self.good, self.good)
        for name in ("mean", "var"):
            others = np.array([0, 2])
            np.testing.assert_array_equal(stats[name][others], thrice[name][others])
            np.testing.assert_array_equal(stats[name][1], twice[name][1])

    def test_ours_shows_it_in_the_output(self):
        y, _ = step(*start(Ours, self.bad), self.bad)
        assert not jnp.isfinite(y[:, 1]).all()
        assert jnp.isfinite(y[:, np.array([0, 2])]).all()


class TestHalfPrecisionEvaluation:
    """Defect 9: nnx rounds the running statistics to dtype at evaluation."""

    # Of bfloat16's numbers, so that rounding x is no part of it.
    x = jnp.asarray(np.asarray(normal((64, 4), 100, 4)).astype(jnp.bfloat16), jnp.float32)

    def gap(self, norm):
        layer = norm(4, momentum=0.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        trained = layer(self.x).astype(jnp.float32)
        return float(jnp.abs(trained - layer(self.x, True).astype(jnp.float32)).max())

    def test_flax(self, flax_rules, flax_still):
        with flax_rules():
            gap = self.gap(TheirsNnx)
        flax_still("9 (statistics rounded to dtype)", gap > 2**-6)

    def test_ours(self):
        # y is below 4, where one step of bfloat16 is 2⁻⁶ at most, and either may be tipped over.
        assert self.gap(OursNnx) <= 2**-6


class TestFloatMask:
    """Defect 10: a float mask is cast to bool, or refused; a 1-D one fails obscurely."""

    x = normal((8, 3))
    weights = jnp.array([0.5, 2.0, 1.0, 0.0, 1.0, 1.0, 3.0, 0.25])

    def test_flax(self, flax_rules, flax_still):
        weighted = jnp.average(self.x, 0, self.weights)
        with flax_rules():
            stats = stats_after(Theirs, self.x, mask=self.weights[:, None], momentum=0.0)
        flax_still("10 (float mask)", not np.allclose(stats["mean"], weighted, atol=1e-2))

    def test_flax_one_dimension(self, flax_rules, flax_still):
        with flax_rules():
            try:
                stats_after(Theirs, self.x, mask=self.weights > 0)
            except ValueError as error:
                message = str(error)
            else:
                message = "mask"
        flax_still("10 (1-D mask)", "mask" not in message)

    @pytest.mark.parametrize("weights", [weights, weights[:, None]], ids=["1-D", "2-D"])
    def test_ours(self, weights):
        stats = stats_after(Ours, self.x, mask=weights, momentum=0.0)
        mean = np.average(self.x, 0, self.weights)
        var = np.average((self.x - mean[None]) ** 2, 0, self.weights)
        np.testing.assert_allclose(stats["mean"], mean, atol=1e-6)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


class TestOneExample:
    """Defect 16: training with one value per feature gives bias, silently."""

    x = normal((1, 3))

    def test_flax(self, flax_rules, flax_still):
        with flax_rules():
            try:
                y, _ = step(*start(Theirs, self.x), self.x)
            except ValueError:
                y = jnp.ones(3)
        flax_still("16 (one value per feature)", not y.any())

    def test_ours_warns(self):
        layer, variables = start(Ours, self.x)
        with pytest.warns(SingleValueWarning, match="more than one value per feature"):
            layer.apply(variables, self.x, False, mutable=["batch_stats"])
        with pytest.warns(SingleValueWarning, match="more than one value per feature"):
            OursNnx(3, rngs=nnx.Rngs(0))(self.x)

    def test_ours_with_the_rest_of_the_batch_elsewhere(self):
        layer, variables = start(Ours, self.x, axis_name="examples")
        x = normal((8, 1, 3))
        y = jax.jit(jax.vmap(lambda x: step(layer, variables, x)[0], axis_name="examples"))(x)
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)


class TestStrictPromotion:
    """Defect 18: half precision fails where promotion is strict."""

    x = jnp.asarray(np.asarray(normal((8, 3))).astype(jnp.bfloat16))

    def test_flax(self, flax_still):
        try:
            Theirs().init(KEY, self.x, False)
            TheirsNnx(3, rngs=nnx.Rngs(0))(self.x)
            message = ""
        except ValueError as error:
            message = str(error)
        flax_still("18 (strict promotion)", "promotion" in message)

    def test_ours(self):
        assert step(*start(Ours, self.x), self.x)[0].dtype == jnp.float32
        assert OursNnx(3, rngs=nnx.Rngs(0))(self.x).dtype == jnp.float32


class TestAxisIndexGroups:
    """Defect 11: groups work neither under vmap nor under shard_map's default checks."""

    groups = ((0, 1), (2, 3))
    x = normal((4, 2, 3))

    def mapped(self, norm):
        layer, variables = start(norm, self.x[0])
        layer = norm(axis_name="i", axis_index_groups=self.groups)
        return jax.vmap(lambda x: step(layer, variables, x), axis_name="i")(self.x)

    def sharded(self, norm):
        layer, variables = start(norm, self.x[0])
        layer = norm(axis_name="i", axis_index_groups=self.groups)
        mesh = make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        run = jax.shard_map(
            lambda x: step(layer, variables, x)[0],
            mesh=mesh,
            in_specs=jax.P("i"),
            out_specs=jax.P("i"),
        )
        return run(self.x.reshape(8, 3)).reshape(self.x.shape)

    @pytest.mark.parametrize("where", ["mapped", "sharded"])
    def test_flax(self, where, flax_rules, flax_still):
        with flax_rules():
            try:
                getattr(self, where)(Theirs)
            except NotImplementedError:
                return
        flax_still("11 (axis_index_groups)", False)

    def test_ours(self):
        y, _ = self.mapped(Ours)
        np.testing.assert_allclose(self.sharded(Ours), y, atol=1e-6)
        for pair in self.groups:
            alone, _ = step(*start(Ours, self.x[0]), self.x[pair, ...].reshape(4, 3))
            np.testing.assert_allclose(y[pair, ...].reshape(4, 3), alone, atol=1e-6)
