"""The linen shell: flax's conventions, and what is ours."""

import dataclasses
import inspect
import pickle
import re

import flax.errors
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.layers.linen import BatchNorm
from tests.layers.draws import normal

KEY = jax.random.key(0)
X = normal((8, 5), 3, 2)


def train(layer, variables, x, **options):
    return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **options)


def trained(layer, x=X):
    variables = layer.init(KEY, x, use_running_average=False)
    y, updates = train(layer, variables, x)
    return y, variables | updates


def test_constructor_is_flax_and_more():
    ours, theirs = dataclasses.fields(BatchNorm), dataclasses.fields(nn.BatchNorm)
    ours = [f for f in ours if f.name not in ("parent", "name")]
    theirs = [f for f in theirs if f.name not in ("parent", "name")]
    assert [f.name for f in ours[: len(theirs)]] == [f.name for f in theirs]
    assert [f.name for f in ours[len(theirs) :]] == ["average", "unbiased", "group_size", "renorm"]
    for our, their in zip(ours, theirs, strict=False):
        assert our.default == their.default, our.name
    # Fields are inherited, and a new one of flax's would have no effect.
    lists = re.findall(r"^ {8}(\w+(?:, \w+)*): ", BatchNorm.__doc__, re.MULTILINE)
    assert {field.name for field in ours} == set(", ".join(lists).split(", "))


def test_call_is_flax():
    """And what we add is by keyword, and may be left out."""
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(layer.__call__).parameters.values()]
        for layer in (BatchNorm, nn.BatchNorm)
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert ours == [*theirs, ("scale", keyword, None), ("bias", keyword, None)]


def test_names_in_the_tree_are_flax():
    def model(norm):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = norm(use_running_average=False)(x)
                return norm(use_running_average=False, name="last")(x)

        return Model().init(KEY, X)

    ours, theirs = model(BatchNorm), model(nn.BatchNorm)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert set(ours["params"]) == {"BatchNorm_0", "last"}


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("layer", [BatchNorm(), BatchNorm(average=bn.DebiasedEma(0.9))], ids=str)
def test_initialization_updates_nothing(layer, evaluate):
    variables = layer.init(KEY, X, use_running_average=evaluate)
    stats = variables["batch_stats"]
    assert set(stats) == ({"mean", "var"} if layer.average is None else {"mean", "var", "count"})
    assert not stats["mean"].any()
    assert (stats["var"] == 1).all()
    assert not stats.get("count", np.zeros(())).any()


def test_initialization_takes_one_example_and_no_axis_name(flax_rules):
    x = X[:1]
    y, variables = BatchNorm(axis_name="devices").init_with_output(KEY, x, False)
    with flax_rules():
        y_theirs, theirs = nn.BatchNorm(axis_name="devices").init_with_output(KEY, x, False)
    np.testing.assert_array_equal(y, y_theirs)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs)


def test_initialization_normalizes_by_the_unmasked(close, flax_rules):
    mask = jnp.arange(8) < 5
    y, _ = BatchNorm(epsilon=0.5).init_with_output(KEY, X, False, mask=mask)
    with flax_rules():
        theirs, _ = nn.BatchNorm(epsilon=0.5, use_fast_variance=False).init_with_output(
            KEY, X, False, mask=mask[:, None]
        )
    close(y, theirs, size=float(jnp.abs(X).max()))


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm], ids=["ours", "flax"])
class TestErrorsOfFlax:
    """The same calls raise the same types."""

    @pytest.mark.parametrize(("at_construction", "at_call"), [(None, None), (True, True)])
    def test_use_running_average_once(self, norm, at_construction, at_call):
        with pytest.raises(ValueError, match="use_running_average"):
            norm(at_construction).init(KEY, X, at_call)

    def test_traced_flag(self, norm):
        with pytest.raises(TypeError, match=r"traced array|use_running_average is traced"):
            jax.jit(lambda flag: norm().init(KEY, X, flag))(True)

    def test_statistics_are_not_mutable(self, norm):
        variables = norm().init(KEY, X, True)
        with pytest.raises(flax.errors.ModifyScopeVariableError):
            norm().apply(variables, X, False)

    def test_statistics_are_missing(self, norm):
        variables = norm().init(KEY, X, True)
        with pytest.raises(flax.errors.ScopeCollectionNotFound):
            norm().apply({"params": variables["params"]}, X, True)

    def test_parameters_are_missing(self, norm):
        variables = norm().init(KEY, X, True)
        params = {"bias": variables["params"]["bias"]}
        with pytest.raises(flax.errors.ScopeParamNotFoundError):
            norm().apply(variables | {"params": params}, X, True)

    def test_parameters_do_not_fit(self, norm):
        variables = norm().init(KEY, X, True)
        narrow = norm().init(KEY, X[:, :3], True)
        with pytest.raises(flax.errors.ScopeParamShapeError):
            norm().apply(variables | {"params": narrow["params"]}, X, True)

    def test_axis_name_is_not_bound(self, norm):
        layer = norm(axis_name="devices")
        with pytest.raises(NameError, match="devices"):
            train(layer, layer.init(KEY, X, True), X)

    def test_result_is_inexact(self, norm):
        with pytest.raises(ValueError, match="inexact"):
            norm(dtype=jnp.int32).init(KEY, X, True)


def test_statistics_do_not_fit():
    variables = BatchNorm(use_scale=False, use_bias=False).init(KEY, X, True)
    with pytest.raises(ValueError, match="mean has shape"):
        BatchNorm(use_scale=False, use_bias=False).apply(variables, X[:, :3], True)


class TestGroups:
    """Of devices (axis_index_groups) and of examples (group_size): as the core does it."""

    def test_of_devices(self):
        layer = BatchNorm(axis_name="i", axis_index_groups=[[0, 2], [1, 3]])
        variables = BatchNorm().init(KEY, X, True)
        members = X.reshape(4, 2, 5)
        y, updates = jax.vmap(lambda x: train(layer, variables, x), axis_name="i")(members)
        for pair in ([0, 2], [1, 3]):
            together, alone = train(BatchNorm(), variables, members[pair, ...].reshape(4, 5))
            np.testing.assert_allclose(y[pair, ...].reshape(4, 5), together, atol=1e-6)
            for name, value in alone["batch_stats"].items():
                np.testing.assert_allclose(updates["batch_stats"][name][pair[1]], value, rtol=1e-6)

    def test_that_do_not_fit(self):
        layer = BatchNorm(axis_name="i", axis_index_groups=[[0, 1], [1]])
        variables = BatchNorm().init(KEY, X, True)
        with pytest.raises(ValueError, match=r"must hold each of the 4 indices of axis 'i' once"):
            jax.vmap(lambda x: train(layer, variables, x), axis_name="i")(X.reshape(4, 2, 5))

    def test_of_examples(self):
        y, variables = trained(BatchNorm(group_size=4, momentum=0))
        whole = trained(BatchNorm(momentum=0))[1]
        for part, part_y in zip(jnp.split(X, 2), jnp.split(y, 2), strict=True):
            np.testing.assert_allclose(part_y, trained(BatchNorm(), part)[0], atol=1e-6)
        for name, value in whole["batch_stats"].items():
            np.testing.assert_allclose(variables["batch_stats"][name], value, rtol=1e-6)


def test_momentum_is_checked():
    layer = BatchNorm(momentum=1.5)
    with pytest.raises(ValueError, match="outside of"):
        train(layer, layer.init(KEY, X, True), X)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_accepted_without_effect(fast, forced):
    layer = BatchNorm(
        use_fast_variance=fast, force_float32_reductions=forced, param_dtype=jnp.bfloat16
    )
    y, variables = trained(layer)
    y_default, default = trained(BatchNorm(param_dtype=jnp.bfloat16))
    np.testing.assert_array_equal(y, y_default)
    jax.tree.map(np.testing.assert_array_equal, variables, default)
    assert variables["batch_stats"]["mean"].dtype == jnp.float32


def test_integers_are_taken_as_in_flax(flax_rules, close):
    # Too large for bfloat16 to tell them apart.
    x = 1000 + jnp.arange(40, dtype=jnp.int32).reshape(8, 5)
    y, variables = trained(BatchNorm(dtype=jnp.bfloat16), x)
    with flax_rules():
        y_theirs, theirs = trained(nn.BatchNorm(dtype=jnp.bfloat16, use_fast_variance=False), x)
    close(y, y_theirs, jnp.bfloat16, size=1000)
    assert y.dtype == y_theirs.dtype
    jax.tree.map(close, variables["batch_stats"], theirs["batch_stats"])


def test_complex_data_as_in_flax(flax_rules):
    x = jax.lax.complex(X, X[::-1])
    y, variables = trained(BatchNorm(), x)
    with flax_rules():
        y_theirs, theirs = trained(nn.BatchNorm(use_fast_variance=False), x)
    np.testing.assert_allclose(y, y_theirs, atol=1e-5)
    stats, stats_theirs = variables["batch_stats"], theirs["batch_stats"]
    for name in ("mean", "var"):
        assert stats[name].dtype == stats_theirs[name].dtype
        np.testing.assert_allclose(stats[name], stats_theirs[name], rtol=1e-5)
    assert BatchNorm().init(KEY, x, True)["batch_stats"]["mean"].dtype == jnp.complex64


def test_numpy_and_python_inputs():
    variables = BatchNorm().init(KEY, np.asarray(X), True)
    y, _ = train(BatchNorm(), variables, np.asarray(X), mask=[True] * 7 + [False])
    y_jax, _ = train(BatchNorm(), variables, X, mask=jnp.arange(8) < 7)
    np.testing.assert_array_equal(y, y_jax)


class TestAverage:
    """What is ours: another moving average, and the count it needs."""

    def test_the_default_is_flax_decay_without_a_count(self):
        _, variables = trained(BatchNorm(momentum=0.75))
        _, explicit = trained(BatchNorm(average=bn.Ema(0.75)))
        assert (explicit["batch_stats"].pop("count") == 1).all()
        jax.tree.map(np.testing.assert_array_equal, variables, explicit)

    def test_debiased_is_exact_after_one_step(self, close):
        _, variables = trained(BatchNorm(average=bn.DebiasedEma(0.99)))
        close(variables["batch_stats"]["mean"], X.mean(0), size=float(jnp.abs(X).max()))
        close(variables["batch_stats"]["var"], X.var(0))

    def test_cumulative_over_two_batches(self, close):
        layer = BatchNorm(average=bn.CumulativeAverage())
        _, variables = trained(layer)
        _, updates = train(layer, variables, 2 * X)
        assert (updates["batch_stats"]["count"] == 2).all()
        close(updates["batch_stats"]["mean"], 1.5 * X.mean(0), size=2 * float(jnp.abs(X).max()))

    def test_any_function_of_the_count(self, close):
        layer = BatchNorm(average=lambda count: jnp.where(count < 1, 0.0, 0.5))
        _, variables = trained(layer)
        _, updates = train(layer, variables, 3 * X)
        close(updates["batch_stats"]["mean"], 2 * X.mean(0), size=3 * float(jnp.abs(X).max()))

    def test_evaluation_needs_no_count(self):
        _, plain = trained(BatchNorm())
        y = BatchNorm(average=bn.DebiasedEma(0.9)).apply(plain, X, True)
        np.testing.assert_array_equal(y, BatchNorm().apply(plain, X, True))

    def test_is_static_by_value(self):
        traces = []

        @jax.jit
        def step(variables, x):
            traces.append(None)
            return train(BatchNorm(average=bn.DebiasedEma(0.9)), variables, x)

        variables = BatchNorm(average=bn.DebiasedEma(0.9)).init(KEY, X, True)
        for _ in range(3):
            _, updates = step(variables, X)
            variables = variables | updates
        assert len(traces) == 1


def test_unbiased_variance(close):
    _, variables = trained(BatchNorm(momentum=0.0, unbiased=True))
    close(variables["batch_stats"]["var"], X.var(0, ddof=1))
    _, variables = trained(BatchNorm(momentum=0.0))
    close(variables["batch_stats"]["var"], X.var(0))


def test_no_gradient_flows_into_the_statistics():
    variables = BatchNorm().init(KEY, X, True)

    def total(x):
        _, updates = train(BatchNorm(), variables, x)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates))

    assert not jax.grad(total)(X).any()


class TestCheckpoints:
    """Variables of one are variables of the other, in memory and in bytes."""

    @pytest.mark.parametrize("there_and_back", [False, True])
    def test_in_memory(self, there_and_back, flax_rules, close):
        first, second = nn.BatchNorm(), BatchNorm()
        if there_and_back:
            first, second = second, first
        with flax_rules():
            _, variables = trained(first)
            _, updates = train(second, variables, X)
            variables = variables | updates
            close(first.apply(variables, X, True), second.apply(variables, X, True))

    @pytest.mark.parametrize("there_and_back", [False, True])
    def test_in_bytes(self, there_and_back, flax_rules):
        first, second = nn.BatchNorm(), BatchNorm()
        if there_and_back:
            first, second = second, first
        with flax_rules():
            _, variables = trained(first)
            target = second.init(jax.random.key(9), X, True)
        restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(variables))
        jax.tree.map(np.testing.assert_array_equal, restored, variables)
        assert jax.tree.structure(restored) == jax.tree.structure(variables)
        # What is restored are numpy arrays; training and evaluation go on from them.
        assert isinstance(restored["batch_stats"]["mean"], np.ndarray)
        jax.tree.map(
            np.testing.assert_array_equal,
            train(BatchNorm(), restored, X),
            train(BatchNorm(), variables, X),
        )
        np.testing.assert_array_equal(
            BatchNorm().apply(restored, X, True), BatchNorm().apply(variables, X, True)
        )

    def test_with_count(self):
        layer = BatchNorm(average=bn.DebiasedEma(0.9))
        _, variables = trained(layer)
        target = layer.init(KEY, X, True)
        restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(variables))
        jax.tree.map(np.testing.assert_array_equal, restored, variables)

    def test_the_module_pickles(self):
        layer = BatchNorm(average=bn.DebiasedEma(0.9))
        assert pickle.loads(pickle.dumps(layer)) == layer
