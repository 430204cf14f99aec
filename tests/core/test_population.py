"""Algorithm 2: what inference normalizes by, from the moments of many batches."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn

SIZES = (2, 2, 4, 8, 16, 32, 64)
ESTIMATORS = ("paper", "pooled")
close = partial(np.testing.assert_allclose, rtol=1e-6)


def draw(sizes, mean=0.0, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(mean, 1, (m, 3)).astype(np.float32) for m in sizes]


def oracle(batches, estimator):
    """Mean and variance in numpy's float64, from the paper's lines or from all values."""
    batches = [np.float64(x) for x in batches]
    if estimator == "pooled":
        values = np.concatenate(batches)
        return values.mean(0), values.var(0, ddof=1)
    return np.mean([x.mean(0) for x in batches], 0), np.mean([x.var(0, ddof=1) for x in batches], 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1], (128,), (2,) * 64], ids=str)
@pytest.mark.parametrize("center", [0.0, 1e4])
def test_whatever_the_split(estimator, sizes, center):
    """At a mean of 10⁴ standard deviations, E[x²] - E[x]² in float32 is off by a factor of 48."""
    batches = draw(sizes, center)
    state = bn.population((bn.measure(x) for x in batches), estimator=estimator)
    mean, var = oracle(batches, estimator)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-7, atol=1e-7)
    close(state.var, var)
    np.testing.assert_array_equal(state.count, [len(sizes)] * 3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_leading_axis_is_an_iterable(estimator):
    moments = [bn.measure(x) for x in draw((5,) * 6)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *moments)
    one = bn.population(moments, estimator=estimator)
    jax.tree.map(close, bn.population(stacked, estimator=estimator), one)
    compiled = jax.jit(partial(bn.population, estimator=estimator))
    jax.tree.map(close, compiled(stacked), one)
    jax.tree.map(close, compiled(moments), one)


def test_random_batches_agree_and_sorted_ones_do_not():
    """The paper's variance has no part between the batches: 1 of 5/4 values here."""
    values = draw((4096,))[0] + np.repeat([0.0, 1.0], 2048)[:, None].astype(np.float32)
    shuffled = np.random.default_rng(1).permutation(values)
    sorted_, random = (np.split(part, 32) for part in (values, shuffled))
    var = {
        (order, estimator): np.asarray(
            bn.population(map(bn.measure, parts), estimator=estimator).var
        )
        for order, parts in {"sorted": sorted_, "random": random}.items()
        for estimator in ESTIMATORS
    }
    # A variance of 4096 normal values has a standard error of √(2/4096) = 2%.
    close(var["random", "paper"], var["random", "pooled"], rtol=0.02)
    close(var["sorted", "pooled"], var["random", "pooled"])
    # (1 ± 2·.03)²/4: the halves' means differ by 1, with a standard error of 2/√4096 = .03.
    between = var["sorted", "pooled"] - var["sorted", "paper"]
    np.testing.assert_allclose(between, [0.25] * 3, atol=0.04)


def test_it_is_made_of_the_other_parts():
    """The paper's estimate is a plain running average; pooling is a single batch, merged."""
    moments = [bn.measure(x) for x in draw(SIZES)]
    running = bn.init(3)[1]
    for batch in moments:
        running = bn.advance(running, batch, bn.CumulativeAverage())
    paper = bn.population(moments)
    np.testing.assert_allclose(paper.mean, running.mean, atol=2e-7)
    close(paper.var, running.var)
    merged = bn.advance(bn.init(3)[1], reduce(bn.merge, moments), bn.CumulativeAverage())
    pooled = bn.population(moments, estimator="pooled")
    np.testing.assert_allclose(pooled.mean, merged.mean, atol=1e-7)
    close(pooled.var, merged.var)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_says_nothing_is_left_out(estimator):
    """A batch without values, and one whose moments are not finite in one feature."""
    good = draw((4, 6))
    bad = good[0].copy()
    bad[1, 2] = np.nan
    nothing = bn.measure(good[0], where=np.zeros(4, bool))
    moments = [nothing, bn.measure(good[0]), bn.measure(bad), bn.measure(good[1]), nothing]
    state = bn.population(moments, estimator=estimator)
    for feature, parts in enumerate([[good[0], bad, good[1]]] * 2 + [good]):
        mean, var = oracle([part[:, [feature]] for part in parts], estimator)
        np.testing.assert_allclose(state.mean[feature], mean[0], atol=1e-7)
        close(state.var[feature], var[0])
    np.testing.assert_array_equal(state.count, [3, 3, 2])
    never = bn.population([nothing], estimator=estimator)
    jax.tree.map(np.testing.assert_array_equal, never, bn.init(3)[1])


def test_batches_of_one_value():
    """They have a mean, which pooling uses, and no variance, which the paper's estimate needs."""
    batches = draw((4, 1, 6, 1))
    moments = [bn.measure(x) for x in batches]
    close(bn.population(moments, estimator="pooled").var, oracle(batches, "pooled")[1])
    paper = bn.population(moments)
    close(paper.var, oracle(batches[::2], "paper")[1])
    np.testing.assert_array_equal(paper.count, [2] * 3)
    alone = bn.population(moments[1:2], estimator="pooled")
    jax.tree.map(np.testing.assert_array_equal, alone, bn.init(3)[1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weights(estimator):
    """Integers count copies; of floats only the proportions matter, as for numpy's aweights."""
    batches = draw((6, 9))
    copies = [np.arange(len(x)) % 3 for x in batches]
    state = bn.population(
        (bn.measure(x, where=k) for x, k in zip(batches, copies, strict=True)), estimator=estimator
    )
    repeated = [np.repeat(x, k, axis=0) for x, k in zip(batches, copies, strict=True)]
    close(state.var, oracle(repeated, estimator)[1])

    importances = [np.float32(0.1 + k) for k in copies]
    moments = [bn.measure(x, where=w) for x, w in zip(batches, importances, strict=True)]
    state = bn.population(moments, estimator=estimator)
    if estimator == "paper":
        var = [np.cov(x.T, aweights=w) for x, w in zip(batches, importances, strict=True)]
        var = np.diag(np.mean(var, 0))
    else:
        var = np.diag(np.cov(np.concatenate(batches).T, aweights=np.concatenate(importances)))
    close(state.var, var)


def test_layers_of_a_network():
    batches = draw((4, 8))
    layers = [{"a": bn.measure(x), "b": [bn.measure(x[:, :2] * 3)]} for x in batches]
    states = bn.population(iter(layers))
    jax.tree.map(close, states["a"], bn.population(layer["a"] for layer in layers))
    jax.tree.map(close, states["b"][0], bn.population(layer["b"][0] for layer in layers))


def test_it_reads_one_batch_at_a_time():
    """An iterable is never held: a batch is asked for when the one before it was used."""
    alive = []

    def batches():
        for x in draw((4,) * 5):
            moments = bn.measure(x)
            alive.append(moments.mean)
            yield moments
            del moments
            alive.pop().delete()  # whoever reads it later fails

    assert np.isfinite(bn.population(batches()).var).all()


def test_double_precision_and_complex_data(x64):
    random = np.random.default_rng(0)
    batches = [random.normal(7, 2, (m, 2)) + 1j * random.normal(0, 1, (m, 2)) for m in SIZES]
    for parts in batches, [x.real for x in batches]:
        for estimator in ESTIMATORS:
            state = bn.population(map(bn.measure, parts), estimator=estimator)
            values = np.concatenate(parts)
            expected = (
                (values.mean(0), values.var(0, ddof=1))
                if estimator == "pooled"
                else [
                    np.mean([f(x) for x in parts], 0)
                    for f in (lambda x: x.mean(0), lambda x: x.var(0, ddof=1))
                ]
            )
            jax.tree.map(partial(close, rtol=1e-13), tuple(state[:2]), tuple(expected))


def test_no_gradient_flows():
    def loss(x):
        return bn.population([bn.measure(x)]).var.sum()

    assert not jax.grad(loss)(draw((4,))[0]).any()


def test_mistakes_are_named():
    moments = bn.measure(draw((4,))[0])
    with pytest.raises(ValueError, match="there are no batches"):
        bn.population(iter([]))
    with pytest.raises(ValueError, match=r"estimator='mean' must be \"paper\" or \"pooled\""):
        bn.population([moments], estimator="mean")
    with pytest.raises(ValueError, match=r"population\(\[moments\]\)"):
        bn.population(jax.tree.map(lambda part: part[0], moments))
    with pytest.raises(TypeError, match=r"shape \(3,\) that belongs to no Moments"):
        bn.population([bn.init(3)[1]])
    with pytest.raises(TypeError, match="measure"):
        bn.population([np.ones((4, 3))])
