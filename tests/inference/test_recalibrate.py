"""New running statistics for whole models: of the data, whatever the split, and nothing else."""

import functools

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax as bn
import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.inference.recalibrate import recalibrate_linen, recalibrate_nnx
from tests.layers.flax_modes import TREE, set_modes

SIZES = (2, 2, 4, 8, 16, 32, 64)
ESTIMATORS = ("pooled", "paper")
LINEN = {"linen": bn_jax.layers.linen.BatchNorm, "flax linen": nn.BatchNorm}
NNX = {"nnx": bn_jax.layers.nnx.BatchNorm, "flax nnx": nnx.BatchNorm}


@pytest.fixture(autouse=True)
def flax_rules(lenient):
    """Flax's own layers need ordinary promotion."""


def draw(sizes, mean=0.0, features=3, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(mean, 1, (m, features)).astype(np.float32) for m in sizes]


def statistics(batches, estimator):
    """Mean and variance in float64, by the definitions."""
    if estimator == "pooled":
        values = np.concatenate(batches)
        return values.mean(0), values.var(0, ddof=1)
    return np.mean([x.mean(0) for x in batches], 0), np.mean([x.var(0, ddof=1) for x in batches], 0)


KERNEL = np.random.default_rng(9).normal(0, 0.5, (3, 4)).astype(np.float32)


def oracle(batches, estimator):
    """Both layers' statistics, of batch norm, a product with KERNEL, batch norm."""
    first = [np.float64(x) for x in batches]
    normalized = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in first]
    second = [x @ np.float64(KERNEL) for x in normalized]
    return [statistics(parts, estimator) for parts in (first, second)]


class Linen(nn.Module):
    norm: type
    frozen: bool = False

    @nn.compact
    def __call__(self, x, train, mask=None):
        x = self.norm(use_running_average=not train, name="first")(x, mask=mask)
        x = nn.Dense(4, use_bias=False, kernel_init=lambda *_: jnp.asarray(KERNEL))(x)
        return self.norm(use_running_average=self.frozen or not train, name="second")(x)


class Nnx(nnx.Module):
    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.first, self.second = norm(3, rngs=rngs), norm(4, rngs=rngs)
        self.dense = nnx.Linear(
            3, 4, use_bias=False, kernel_init=lambda *_: jnp.asarray(KERNEL), rngs=rngs
        )

    def __call__(self, x, mask=None):
        return self.second(self.dense(self.first(x, mask=mask)))


@functools.cache  # one function for one model, so that it is compiled once
def linen_forward(model, **options):
    return lambda variables, x: model.apply(
        variables, x, train=True, mutable=["batch_stats"], **options
    )


def nnx_forward(model, x):
    return model(x)


def recalibrated(kind, batches, estimator):
    """Mean and variance of both layers."""
    if kind in LINEN:
        model = Linen(LINEN[kind])
        variables = model.init(jax.random.key(0), batches[0], train=False)
        new = recalibrate_linen(linen_forward(model), variables, iter(batches), estimator=estimator)
        return [(new["batch_stats"][n]["mean"], new["batch_stats"][n]["var"]) for n in NAMES]
    model = Nnx(NNX[kind])
    paths = recalibrate_nnx(nnx_forward, model, iter(batches), estimator=estimator)
    assert sorted(paths) == ["first", "second"]
    return [(getattr(model, n).mean[...], getattr(model, n).var[...]) for n in NAMES]


NAMES = ("first", "second")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [*LINEN, *NNX])
def test_the_statistics_of_the_data_whatever_the_split(kind, estimator):
    """The second layer sees what the first makes of each batch: its rounding is float32's.

    Batches of two have x̂ = ±1 but for ε; there, float32 rounds σ² + ε to 6e-8, and so x̂.
    """
    for sizes in (SIZES, SIZES[::-1]):
        batches = draw(sizes)
        found = recalibrated(kind, batches, estimator)
        for (mean, var), (true_mean, true_var), rounding in zip(
            found, oracle(batches, estimator), (1e-6, 4e-6), strict=True
        ):
            np.testing.assert_allclose(mean, true_mean, atol=rounding)
            np.testing.assert_allclose(var, true_var, rtol=rounding)


@pytest.mark.parametrize("kind", [*LINEN, *NNX])
def test_a_mean_that_is_large_against_the_spread(kind):
    """fvcore's E[x²] - E[x]² in float32 gives 48 for this variance of 1."""
    batches = draw(SIZES, mean=1e4)
    mean, var = recalibrated(kind, batches, "pooled")[0]
    true_mean, true_var = statistics([np.float64(x) for x in batches], "pooled")
    np.testing.assert_allclose(mean, true_mean, rtol=1e-7)
    np.testing.assert_allclose(var, true_var, rtol=1e-6)


@pytest.mark.parametrize("kind", LINEN)
def test_all_else_stays_in_linen(kind):
    """Parameters, other collections, frozen layers, and the kinds of mappings."""
    model, batches = Linen(LINEN[kind], frozen=True), draw((4, 8))
    variables = model.init(jax.random.key(0), batches[0], train=False)
    old = flax.core.freeze({**variables, "other": {"kept": jnp.ones(2)}})
    new = recalibrate_linen(linen_forward(model), old, batches)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    changed = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True
        )
        if not np.array_equal(a, b)
    ]
    assert changed == [f"['batch_stats']['first']['{name}']" for name in ("mean", "var")]


@pytest.mark.parametrize("kind", NNX)
def test_all_else_stays_in_nnx(kind):
    model, batches = Nnx(NNX[kind]), draw((4, 8))
    model.second.use_running_average = True
    graph, old = nnx.split(model)
    old = jax.tree.map(np.array, old)
    variables = (model.first.mean, model.dense.kernel)
    assert recalibrate_nnx(lambda model, x: model(x), model, batches) == ["first"]
    assert nnx.graphdef(model) == graph
    assert variables[0] is model.first.mean
    assert variables[1] is model.dense.kernel
    assert type(model.first) is NNX[kind]
    same = jax.tree.map(np.array_equal, nnx.state(model), old)
    changed = [path for path, leaf in nnx.to_flat_state(same) if not leaf.get_value()]
    assert sorted(changed) == [("first", "mean"), ("first", "var")]


@pytest.mark.parametrize("kind", [*LINEN, *NNX])
def test_masks(kind):
    """What is masked out may hold anything; a batch weighs by what is left."""
    batches = draw((6, 10))
    masks = [np.arange(len(x)) < 0.7 * len(x) for x in batches]
    full = [np.repeat(mask[:, None], 3, 1) for mask in masks]
    pairs = list(zip(batches, full, strict=True))
    if kind in LINEN:
        model = Linen(LINEN[kind])
        variables = model.init(jax.random.key(0), batches[0], train=False)
        new = recalibrate_linen(
            lambda variables, pair: model.apply(
                variables, pair[0], mask=pair[1], train=True, mutable=["batch_stats"]
            ),
            variables,
            pairs,
        )
        mean, var = (new["batch_stats"]["first"][n] for n in ("mean", "var"))
    else:
        model = Nnx(NNX[kind])
        recalibrate_nnx(lambda model, pair: model(pair[0], mask=pair[1]), model, pairs)
        mean, var = model.first.mean[...], model.first.var[...]
    kept = [np.float64(x[mask]) for x, mask in zip(batches, masks, strict=True)]
    true_mean, true_var = statistics(kept, "pooled")
    np.testing.assert_allclose(mean, true_mean, atol=1e-6)
    np.testing.assert_allclose(var, true_var, rtol=1e-6)


class TwiceNnx(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.same = nnx.data(self.norm)

    def __call__(self, x):
        return self.norm(x) + self.same(5 * x + 1)


def test_a_layer_that_is_used_twice_sees_both():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=False, name="norm")
            return norm(x) + norm(5 * x + 1)

    batches = draw((4, 8))
    both = [np.float64(part) for x in batches for part in (x, 5 * x + 1)]
    mean, var = statistics(both, "pooled")
    model = Twice()
    variables = model.init(jax.random.key(0), batches[0])
    new = recalibrate_linen(
        lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]), variables, batches
    )
    np.testing.assert_allclose(new["batch_stats"]["norm"]["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["norm"]["var"], var, rtol=1e-6)
    # In tree mode, which flax plans to make its default, `nnx.split` alone refuses such a model.
    for modes in {"graph_mode": True, "graph_updates": True}, TREE:
        module = TwiceNnx()
        with set_modes(**modes):
            assert len(recalibrate_nnx(lambda model, x: model(x), module, batches)) == 1
        np.testing.assert_allclose(module.norm.var[...], var, rtol=1e-6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(3)(x)
        return nn.BatchNorm(use_running_average=False, name="norm")(x) + 3, None


class Scanned(nn.Module):
    """Two blocks in one scan, each with parameters and statistics of its own."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        block = nn.remat(Block)
        scan = nn.scan(block, axes, split_rngs={"params": True}, length=2)
        return scan(name="blocks")(x, None)[0]


def test_scanned_and_rematerialized_layers():
    batches = draw((4, 8))
    model = Scanned()
    variables = model.init(jax.random.key(0), batches[0])
    new = recalibrate_linen(
        lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]), variables, batches
    )
    inputs = {0: [], 1: []}
    dense = variables["params"]["blocks"]["Dense_0"]
    for x in map(np.float64, batches):
        for n in range(2):
            x = x @ np.float64(dense["kernel"][n]) + np.float64(dense["bias"][n])
            inputs[n].append(x)
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + 3
    stats = new["batch_stats"]["blocks"]["norm"]
    for n in range(2):
        mean, var = statistics(inputs[n], "pooled")
        np.testing.assert_allclose(stats["mean"][n], mean, atol=4e-6)
        np.testing.assert_allclose(stats["var"][n], var, rtol=4e-6)


def test_scanned_and_rematerialized_layers_of_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return 2 * nnx.remat(lambda norm, x: norm(x))(self.norm, x) + 3

    class Scanned(nnx.Module):
        def __init__(self):
            self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(Block))(nnx.Rngs(0))

        def __call__(self, x):
            scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(x, self.blocks)

    model, batches = Scanned(), draw((4, 8))
    assert recalibrate_nnx(lambda model, x: model(x), model, batches) == ["blocks.norm"]
    mean, var = model.blocks.norm.mean[...], model.blocks.norm.var[...]
    first = statistics([np.float64(x) for x in batches], "pooled")
    np.testing.assert_allclose(mean, [first[0], [3] * 3], atol=1e-6)
    np.testing.assert_allclose(var, [first[1], [4 * 12 / 11] * 3], rtol=1e-4)  # but for ε


@pytest.mark.parametrize("norm", LINEN.values(), ids=LINEN)
def test_named_axes(norm):
    """Members of one axis see one batch, as in training."""
    model = norm(use_running_average=False, axis_name="members")
    batches = [x.reshape(2, -1, 3) for x in draw((4, 8))]
    variables = model.init(jax.random.key(0), batches[0][0])

    def forward(variables, x):
        def member(x):
            return model.apply(variables, x, mutable=["batch_stats"])

        return jax.vmap(member, axis_name="members", out_axes=(0, None))(x)

    new = recalibrate_linen(forward, variables, batches, estimator="paper")
    mean, var = statistics([np.float64(x.reshape(-1, 3)) for x in batches], "paper")
    np.testing.assert_allclose(new["batch_stats"]["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], var, rtol=1e-6)


def test_the_count_is_that_of_the_batches():
    """Statistics in half precision become float32, as in training."""
    model = bn_jax.layers.linen.BatchNorm(use_running_average=False, average=bn.DebiasedEma(0.9))
    batches = draw((4, 8, 2))
    variables = model.init(jax.random.key(0), batches[0])
    half = {"mean": jnp.bfloat16, "var": jnp.bfloat16, "count": jnp.float32}
    stats = {name: variables["batch_stats"][name].astype(dtype) for name, dtype in half.items()}
    new = recalibrate_linen(
        lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]),
        {**variables, "batch_stats": stats},
        batches,
    )["batch_stats"]
    np.testing.assert_array_equal(new["count"], [3.0] * 3)
    assert {name: leaf.dtype.name for name, leaf in new.items()} == dict.fromkeys(half, "float32")


def test_what_no_batch_has_values_of_stays():
    model = nn.BatchNorm(use_running_average=False)
    x = draw((4,))[0]
    mask = np.ones_like(x, bool)
    mask[:, 1] = False
    variables = model.init(jax.random.key(0), x)
    old = {**variables, "batch_stats": {"mean": jnp.full(3, 7.0), "var": jnp.full(3, 8.0)}}
    new = recalibrate_linen(
        lambda variables, x: model.apply(variables, x, mask=mask, mutable=["batch_stats"]), old, [x]
    )
    assert (new["batch_stats"]["mean"] == 7).tolist() == [False, True, False]
    assert (new["batch_stats"]["var"] == 8).tolist() == [False, True, False]


def test_dropout_draws_anew_for_every_batch_and_the_model_keeps_its_random_state():
    class Dropped(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(64, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.dropout(x))

    model = Dropped()
    before = jax.tree.map(jnp.asarray, nnx.state(model, nnx.RngCount))
    ones = np.ones((1, 64), np.float32)
    recalibrate_nnx(lambda model, x: model(x), model, [ones] * 3)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.RngCount), before)
    # One mask for all batches would leave 0 and 2 alone.
    assert len(np.unique(model.norm.mean[...].round(3))) > 2


def test_one_compilation_for_all_batches():
    model, batches = nn.BatchNorm(use_running_average=False), draw((4, 4, 4))
    variables = model.init(jax.random.key(0), batches[0])
    traced = []

    def forward(variables, x):
        traced.append(x.shape)
        return model.apply(variables, x, mutable=["batch_stats"])

    recalibrate_linen(forward, variables, batches)
    once = len(traced)
    assert once <= 2  # once for the shapes of what is seen, once to compile
    recalibrate_linen(forward, variables, batches)
    assert len(traced) == once


def test_mistakes_are_named():
    x = draw((4,))[0]
    model = Linen(nn.BatchNorm)
    variables = model.init(jax.random.key(0), x, train=False)

    def evaluation(variables, x):
        return model.apply(variables, x, train=False, mutable=["batch_stats"])

    with pytest.raises(ValueError, match="train=True"):
        recalibrate_linen(evaluation, variables, [x])
    with pytest.raises(ValueError, match="there are no batches"):
        recalibrate_linen(linen_forward(model), variables, [])
    with pytest.raises(ValueError, match="estimator='all'"):
        recalibrate_linen(linen_forward(model), variables, [x], estimator="all")
    with pytest.raises(ValueError, match=r"one array of shape \(32, 3\), .* \[x\] for one"):
        recalibrate_linen(linen_forward(model), variables, jnp.ones((32, 3)))
    module = Nnx(nnx.BatchNorm)
    with pytest.raises(ValueError, match=r"one array of shape \(32, 3\)"):
        recalibrate_nnx(lambda model, x: model(x), module, np.ones((32, 3)))
    module.eval()
    with pytest.raises(ValueError, match=r"model.train\(\)"):
        recalibrate_nnx(lambda model, x: model(x), module, [x])
    with pytest.raises(ValueError, match="estimator='all'"):
        recalibrate_nnx(lambda model, x: model(x), module, [x], estimator="all")
