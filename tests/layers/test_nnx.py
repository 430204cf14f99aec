"""The nnx shell: flax's conventions, and what is ours."""

import inspect

import flax.errors
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax as bn
import bn_jax.layers.linen
from bn_jax.layers.nnx import BatchNorm
from tests.layers.draws import normal

X = normal((8, 5), 3, 2)
LARGEST = float(np.abs(X).max())
needs_view = pytest.mark.skipif(not hasattr(nnx, "view"), reason="this flax has no nnx.view")


def make(norm=BatchNorm, **settings):
    return norm(settings.pop("num_features", 5), rngs=nnx.Rngs(0), **settings)


def parameters(function):
    return {p.name: p for p in inspect.signature(function).parameters.values()}


def test_constructor_is_flax_and_more():
    ours, theirs = parameters(BatchNorm.__init__), parameters(nnx.BatchNorm.__init__)
    newer = ["promote_dtype", "bias_metadata", "scale_metadata"]
    known = [name for name in ours if name in theirs or name not in newer]
    assert known == [*theirs, "average", "unbiased", "group_size", "renorm"]
    for name, their in theirs.items():
        assert ours[name].default == their.default, name
        assert ours[name].kind == their.kind, name


def test_call_is_flax():
    """And what we add is by keyword, and may be left out."""
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in parameters(layer.__call__).values()]
        for layer in (BatchNorm, nnx.BatchNorm)
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert ours == [*theirs, ("scale", keyword, None), ("bias", keyword, None)]


@pytest.mark.parametrize("flags", [{}, {"use_scale": False}, {"use_bias": False}], ids=str)
def test_state_and_attributes_are_flax(flags, same_tree):
    ours, theirs = make(**flags), make(nnx.BatchNorm, **flags)
    same_tree(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    for kind in (nnx.Param, nnx.BatchStat):
        assert set(nnx.state(ours, kind)) == set(nnx.state(theirs, kind))
    public = {name for name in vars(theirs) if not name.startswith("_")}
    # Only the oldest flax keeps the initializers.
    assert public - {"bias_init", "scale_init"} <= set(vars(ours))
    for name in ("scale", "bias"):
        assert (getattr(ours, name) is None) == (getattr(theirs, name) is None)


def test_train_and_eval():
    layer = make()
    layer(X)
    mean = layer.mean[...]
    layer.eval()
    assert layer.use_running_average
    layer(X)
    np.testing.assert_array_equal(layer.mean[...], mean)
    layer.train()
    layer(X)
    assert (layer.mean[...] != mean).all()


@needs_view
def test_view():
    layer = make()
    evaluating = nnx.view(layer, use_running_average=True)
    np.testing.assert_array_equal(evaluating(X), layer(X, True))
    assert layer.use_running_average is False
    assert nnx.view(evaluating, use_running_average=False).use_running_average is False
    assert nnx.view(evaluating, raise_if_not_found=False).use_running_average is True


def test_the_call_goes_before_the_constructor():
    layer = make(use_running_average=True)
    y = layer(X, use_running_average=False)
    assert layer.mean[...].any()
    np.testing.assert_array_equal(y, make()(X))


@pytest.mark.parametrize("norm", [BatchNorm, nnx.BatchNorm], ids=["ours", "flax"])
class TestErrorsOfFlax:
    def test_use_running_average_is_given_nowhere(self, norm):
        with pytest.raises(ValueError, match="use_running_average"):
            make(norm, use_running_average=None)(X)

    def test_traced_flag(self, norm, flax_rules):
        message = r"traced array|use_running_average is traced"
        with flax_rules(), pytest.raises(TypeError, match=message):
            nnx.jit(lambda layer, flag: layer(X, flag))(make(norm), True)

    def test_axis_name_is_not_bound(self, norm, flax_rules):
        with flax_rules(), pytest.raises(NameError, match="devices"):
            make(norm, axis_name="devices")(X)

    def test_written_in_a_foreign_trace(self, norm, flax_rules):
        layer = make(norm)
        with flax_rules(), pytest.raises(flax.errors.TraceContextError):
            jax.grad(lambda x: layer(x).sum())(X)

    def test_result_is_inexact(self, norm, flax_rules):
        with flax_rules(), pytest.raises(ValueError, match="inexact"):
            make(norm, dtype=jnp.int32)(X)


class TestGroups:
    """Of devices (axis_index_groups) and of examples (group_size): as the core does it."""

    def test_of_devices(self):
        layer = make(axis_name="i", axis_index_groups=[[0, 2], [1, 3]])
        members = X.reshape(4, 2, 5)

        graph, variables = nnx.split(layer)

        def forward(x):
            return nnx.merge(graph, variables, copy=True)(x)

        y = jax.vmap(forward, axis_name="i")(members)
        for pair in ([0, 2], [1, 3]):
            together = make()(members[pair, ...].reshape(4, 5))
            np.testing.assert_allclose(y[pair, ...].reshape(4, 5), together, atol=1e-6)

    def test_of_examples(self):
        layer, whole = make(group_size=4, momentum=0.0), make(momentum=0.0)
        y, _ = layer(X), whole(X)
        for part, part_y in zip(jnp.split(X, 2), jnp.split(y, 2), strict=True):
            np.testing.assert_allclose(part_y, make()(part), atol=1e-6)
        np.testing.assert_allclose(layer.mean[...], whole.mean[...], rtol=1e-6)
        np.testing.assert_allclose(layer.var[...], whole.var[...], rtol=1e-6)


def test_features_do_not_fit():
    with pytest.raises(ValueError, match=r"has shape \(5,\)"):
        make()(X[:, :3])


def test_use_fast_variance_has_no_effect():
    np.testing.assert_array_equal(make(use_fast_variance=False)(X), make()(X))


def test_momentum_may_be_changed_later(close):
    layer = make()
    layer.momentum = 0.0
    layer(X)
    close(layer.mean[...], X.mean(0), size=LARGEST)


def test_metadata():
    layer = make(scale_metadata={"role": "gain"}, bias_metadata={"role": "shift"})
    assert layer.scale.role == "gain"
    assert layer.bias.role == "shift"


def test_initializers_get_the_keys_of_flax():
    settings = {
        "scale_init": jax.nn.initializers.normal(1.0),
        "bias_init": jax.nn.initializers.normal(1.0),
    }
    ours, theirs = make(**settings), make(nnx.BatchNorm, **settings)
    np.testing.assert_array_equal(ours.scale[...], theirs.scale[...])
    np.testing.assert_array_equal(ours.bias[...], theirs.bias[...])


def test_promote_dtype_is_asked():
    """Where x keeps its dtype, so does what is computed from it; mean and var stay as they are."""
    asked = []

    def promote(values, /, *, dtype=None, inexact=True):
        asked.append([None if value is None else value.dtype.name for value in values])
        x, mean, var, scale, bias = values
        return x, mean * 0, var * 0, scale, bias

    layer = make(dtype=jnp.bfloat16, promote_dtype=promote, use_bias=False)
    layer(X)
    reference = make()
    reference(X)
    assert asked == [["float32"] * 4 + [None]]
    np.testing.assert_array_equal(layer.mean[...], reference.mean[...])
    np.testing.assert_array_equal(layer(X, True), reference(X, True).astype(jnp.bfloat16))


def test_several_feature_axes_equal_linen():
    x = X.reshape(4, 2, 5)
    layer = make(num_features=(2, 5), axis=(1, -1))
    linen = bn_jax.layers.linen.BatchNorm(axis=(1, -1))
    variables = linen.init(jax.random.key(0), x, True)
    y, updates = linen.apply(variables, x, False, mutable=["batch_stats"])
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.mean[...], updates["batch_stats"]["mean"])
    np.testing.assert_array_equal(layer.var[...], updates["batch_stats"]["var"])


@pytest.mark.parametrize("features", [np.int64(5), [5], (5,)], ids=str)
def test_numbers_of_features(features):
    np.testing.assert_array_equal(make(num_features=features)(X), make()(X))


def test_complex_data():
    x = jax.lax.complex(X, X[::-1])
    layer = make(param_dtype=jnp.complex64, momentum=0.0)
    y = layer(x)
    np.testing.assert_allclose(layer.mean[...], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(jnp.var(y, 0), 1, rtol=1e-4)
    with pytest.raises(TypeError, match="complex"):
        make()(x)


class TestAverage:
    def test_there_is_no_count_unless_asked_for(self):
        assert "count" not in nnx.to_pure_dict(nnx.state(make()))
        counting = make(average=bn.CumulativeAverage())
        assert set(nnx.state(counting, nnx.BatchStat)) == {"mean", "var", "count"}
        assert counting.count[...].dtype == jnp.float32

    def test_the_default_is_flax_decay(self):
        plain, explicit = make(momentum=0.75), make(average=bn.Ema(0.75))
        plain(X)
        explicit(X)
        np.testing.assert_array_equal(plain.mean[...], explicit.mean[...])
        np.testing.assert_array_equal(plain.var[...], explicit.var[...])

    def test_debiased_is_exact_after_one_step(self, close):
        layer = make(average=bn.DebiasedEma(0.99))
        layer(X)
        close(layer.mean[...], X.mean(0), size=LARGEST)
        close(layer.var[...], X.var(0))

    def test_cumulative_over_two_batches(self, close):
        layer = make(average=bn.CumulativeAverage())
        layer(X)
        layer(2 * X)
        assert (layer.count[...] == 2).all()
        close(layer.mean[...], 1.5 * X.mean(0), size=2 * LARGEST)
        layer(X, True)
        assert (layer.count[...] == 2).all()


def test_unbiased_variance(close):
    layer = make(momentum=0.0, unbiased=True)
    layer(X)
    close(layer.var[...], X.var(0, ddof=1))


class TestCheckpoints:
    """The state of one is the state of the other, in memory and in bytes."""

    @pytest.mark.parametrize("there_and_back", [False, True])
    def test_state(self, there_and_back, flax_rules, close):
        first, second = make(nnx.BatchNorm), make()
        if there_and_back:
            first, second = second, first
        with flax_rules():
            first(X)
            data = flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(first)))
            target = nnx.to_pure_dict(nnx.state(second))
            restored = flax.serialization.from_bytes(target, data)
            nnx.update(second, restored)
            close(second(X, True), first(X, True))
            # Variables that are numpy arrays cannot be written to, flax's or ours.
            nnx.update(second, jax.tree.map(jnp.asarray, restored))
            second(X)
            nnx.update(first, nnx.state(second))
            close(second(X, True), first(X, True))

    def test_linen_variables_fit(self):
        linen = bn_jax.layers.linen.BatchNorm()
        variables = linen.init(jax.random.key(0), X, True)
        _, updates = linen.apply(variables, X, False, mutable=["batch_stats"])
        layer = make()
        nnx.update(layer, variables["params"] | updates["batch_stats"])
        np.testing.assert_array_equal(layer(X, True), linen.apply(variables | updates, X, True))
