"""Each planted fault is the first verdict, and a healthy network has none."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax as bn
from bn_jax.explain import explain
from bn_jax.explain.models import explain_linen, explain_nnx
from bn_jax.explain.report import CAUSES

BATCHES, SIZE, FEATURES = 60, 32, 8


def draw(seed, size=SIZE, spread=2.0, shift=0.0):
    """Batches for two layers, whose features have means and scales of their own."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal((BATCHES, 2, size, FEATURES))
    means, scales = np.linspace(-3, 5, FEATURES), np.linspace(0.5, spread, FEATURES)
    return (means + shift + scales * normal).astype(np.float32)


def moments(data):
    """By numpy, which compiles nothing."""

    def of(x):
        return bn.Moments(x.mean(0), x.var(0), np.full(FEATURES, len(x), np.float32))

    return [{"first": of(a), "second": of(b)} for a, b in data]


def running(data, decay=0.99, debiased=True):
    """The statistics that training leaves."""
    weights = (1 - decay) * decay ** np.arange(len(data))[::-1]
    start = 0 if debiased else 1 - weights.sum()
    weights = weights / weights.sum() if debiased else weights

    def of(layer):
        mean = weights @ layer.mean(1)
        var = weights @ layer.var(1, ddof=1) + start  # from 0 and 1
        count = jnp.full(FEATURES, len(data))
        return bn.BatchNormState(jnp.float32(mean), jnp.float32(var), count)

    return {"first": of(data[:, 0]), "second": of(data[:, 1])}


def replaced(states, **fields):
    """The second layer's with other values for feature 3."""
    second = states["second"]
    new = {k: getattr(second, k).at[3].set(v) for k, v in fields.items()}
    return states | {"second": second._replace(**new)}


def sorted_by_class(data):
    """Half of the batches are of one class, half of the other."""
    return data + np.where(np.arange(BATCHES) % 2, 2.0, -2.0)[:, None, None, None].astype(
        np.float32
    )


HEALTHY = draw(0)
NEW = {"first": bn.init(FEATURES)[1], "second": bn.init(FEATURES)[1]}


def dead():
    data = HEALTHY.copy()
    data[:, 1, :, 3] = 7
    return data


def not_finite():
    data = HEALTHY.copy()
    data[:, 1, :, 3] = np.nan
    return data


def exploding():
    data = HEALTHY.copy()
    data[:, 1, :, 3] *= 1e5
    return data


def lagging(features=(3,), by=2.0):
    """The means of some features have moved since."""
    states = running(HEALTHY)
    mean = states["second"].mean
    for feature in features:
        mean = mean.at[feature].add(by)
    return states | {"second": states["second"]._replace(mean=mean)}


SORTED, FEW = sorted_by_class(HEALTHY), draw(0, 3)

# fault -> (its cause, running statistics, training data, evaluation data, options)
FAULTS = {
    "NaN in the state": ("not finite", replaced(running(HEALTHY), var=np.nan), HEALTHY),
    "negative variance": ("not finite", replaced(running(HEALTHY), var=-1.0), HEALTHY),
    "NaN in the data": ("data not finite", running(HEALTHY), not_finite()),
    "never updated": ("never updated", NEW, HEALTHY),
    "stale": ("other weights", running(draw(1, shift=1.5)), HEALTHY),
    "another model": ("other weights", running(draw(1, spread=8.0)), HEALTHY),
    "few steps": ("young average", running(HEALTHY[:10], debiased=False), HEALTHY),
    "pure batches": ("pure batches", running(SORTED), SORTED),
    "momentum of 0.01": ("inverted momentum", running(HEALTHY, 0.01), HEALTHY),
    "momentum of 0.1": ("inverted momentum", running(HEALTHY, 0.1), HEALTHY),
    "shift": ("shifted evaluation", running(HEALTHY), HEALTHY, draw(2, shift=2.0)),
    "large epsilon": ("epsilon", running(HEALTHY), HEALTHY, None, {"epsilon": 100.0}),
    "small batches": ("small batches", running(FEW), FEW, None, {"batch_size": 3}),
    "dead feature": ("dead features", running(dead()), dead()),
    "exploding feature": ("exploding features", running(exploding()), exploding()),
    "averaged weights": (
        "averaged weights",
        {name: s._replace(var=1.5 * s.var) for name, s in running(HEALTHY).items()},
        HEALTHY,
    ),
    "moving weights": ("lagging average", lagging(), HEALTHY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault):
    cause, states, training, *others = FAULTS[fault]
    evaluation, options = (*others, *[None, {}][len(others) :])
    report = explain(
        states,
        moments(training),
        None if evaluation is None else moments(evaluation),
        **{"batch_size": SIZE} | options,
    )
    assert report.findings, report
    assert report.findings[0].cause.name == cause, str(report)
    assert cause in str(report)
    assert report.remedy in report.verdict.replace("    ", "")


def test_every_cause_has_its_fault():
    assert {fault[0] for fault in FAULTS.values()} == {cause.name for cause in CAUSES}


@pytest.mark.parametrize("seed", range(5))
def test_nothing_wrong(seed):
    data = draw(seed)
    report = explain(running(data), moments(data), moments(draw(seed + 50)), batch_size=SIZE)
    assert report.findings == (), str(report)
    assert report.verdict.startswith("Nothing wrong")


@pytest.mark.parametrize(
    ("by", "population", "said"),
    [(0.4, 0.8946, True), (0.4, 0.8852, False), (0.0, 0.8946, False)],
)
def test_a_small_lag_is_said_where_scores_differ(by, population, said):
    """The verdict stays that no cause was found."""
    report = explain(lagging(by=by), moments(HEALTHY), batch_size=SIZE)
    report = dataclasses.replace(report, scores={"running": 0.8832, "population": population})
    assert report.findings == ()
    lag = "The running statistics lag a little (change 0.12): the population's score 0.0114 more."
    assert report.verdict.startswith(lag if said else "Nothing wrong"), str(report)


def test_one_layer_alone_does_not_make_an_inverted_momentum():
    """The first layers of a young network move as fast as their batches differ."""
    states = running(HEALTHY, 0.01) | {"second": running(HEALTHY)["second"]}
    report = explain(states, moments(HEALTHY), batch_size=SIZE)
    assert report.rows["first"].likeness.fits
    assert not report.rows["second"].likeness.fits
    assert "inverted momentum" not in str(report)


def test_means_that_moved_do_not_make_an_inverted_momentum():
    """Weights that move carry the means away, and hardly the variances: no batch looks so."""
    one, many = running(HEALTHY, 0.01), running(HEALTHY)
    moved = {name: many[name]._replace(mean=one[name].mean) for name in many}
    assert explain(one, moments(HEALTHY), batch_size=SIZE).rows["first"].likeness.fits
    assert not explain(moved, moments(HEALTHY), batch_size=SIZE).rows["first"].likeness.fits


def test_the_numbers():
    """Of two states that differ by hand: J, by its definition."""
    data = moments(HEALTHY)
    state = bn.population([batch["first"] for batch in data], estimator="pooled")
    moved = state._replace(mean=state.mean + 0.5 * np.sqrt(state.var), var=2 * state.var)
    row = explain({"a": moved}, ({"a": b["first"]} for b in data), batch_size=SIZE).rows["a"]
    # ½(2 + ½ - 2) + ½·¼·(1 + ½)
    np.testing.assert_allclose(row.distance, 0.25 + 0.1875, rtol=1e-3)
    # Of normal values: 1/m between means, and ½·2/m between variances.
    np.testing.assert_allclose(row.noise, 2 / SIZE, rtol=0.2)
    np.testing.assert_allclose(row.purity, 1, rtol=0.3)
    assert np.isnan(row.shift)
    assert row.features == FEATURES


class Linen(nn.Module):
    norm: type
    frozen: bool = False

    @nn.compact
    def __call__(self, x):
        x = self.norm(use_running_average=False, name="norm")(x)
        return self.norm(use_running_average=self.frozen, name="second")(jnp.tanh(x))


def layers_of(kind):
    import bn_jax.layers.linen
    import bn_jax.layers.nnx

    return {
        "linen": bn_jax.layers.linen.BatchNorm,
        "flax linen": nn.BatchNorm,
        "nnx": bn_jax.layers.nnx.BatchNorm,
        "flax nnx": nnx.BatchNorm,
    }[kind]


@pytest.mark.parametrize("kind", ["linen", "flax linen", "nnx", "flax nnx"])
def test_models(kind, lenient):
    """A new model was never updated; after new statistics, nothing is wrong with it."""
    from bn_jax.inference.recalibrate import recalibrate_linen, recalibrate_nnx

    batches, norm = list(HEALTHY[:, 0]), layers_of(kind)
    if "linen" in kind:
        model = Linen(norm)
        variables = model.init(jax.random.key(0), batches[0])

        def forward(variables, x):
            return model.apply(variables, x, mutable=["batch_stats"])

        def ask(variables):
            return explain_linen(forward, variables, iter(batches), batches[:5])

        before, after = ask(variables), ask(recalibrate_linen(forward, variables, batches))
    else:
        model = nnx.Sequential(
            norm(FEATURES, rngs=nnx.Rngs(0)), jnp.tanh, norm(FEATURES, rngs=nnx.Rngs(0))
        )

        def call(model, x):
            return model(x)

        before = explain_nnx(call, model, iter(batches), batches[:5])
        recalibrate_nnx(call, model, batches)
        after = explain_nnx(call, model, iter(batches), batches[:5])
    assert before.findings[0].cause.name == "never updated"
    assert len(before.rows) == 2
    assert after.findings == (), str(after)


def test_frozen_layers_are_left_out(lenient):
    model = Linen(nn.BatchNorm, frozen=True)
    variables = model.init(jax.random.key(0), HEALTHY[0, 0])
    report = explain_linen(
        lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]),
        variables,
        HEALTHY[:, 0],
    )
    assert list(report.rows) == ["norm"]


def test_each_layers_own_epsilon_is_read(lenient):
    """Nobody who has set it wrong would pass it to explain."""
    model = nnx.BatchNorm(FEATURES, epsilon=50.0, rngs=nnx.Rngs(0))
    model.mean.set_value(jnp.asarray(HEALTHY[:, 0].mean((0, 1))))
    model.var.set_value(jnp.asarray(HEALTHY[:, 0].var((0, 1))))
    report = explain_nnx(lambda model, x: model(x), model, HEALTHY[:, 0])
    assert report.findings[0].cause.name == "epsilon"
    stats = {"mean": model.mean.get_value(), "var": model.var.get_value()}
    scale = {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}
    variables = {"params": {"norm": scale}, "batch_stats": {"norm": stats}}
    wrapped = Wrapped(nn.BatchNorm(use_running_average=False, epsilon=50.0))

    def forward(variables, x):
        return wrapped.apply(variables, x, mutable=["batch_stats"])

    report = explain_linen(forward, variables, HEALTHY[:, 0])
    assert report.findings[0].cause.name == "epsilon"
    assert explain_linen(forward, variables, HEALTHY[:, 0], epsilon=1e-5).findings == ()
    compiled = jax.jit(forward)
    for again in (forward, compiled, compiled):  # what was traced before is not traced again
        report = explain_linen(again, variables, HEALTHY[:, 0])
        assert report.findings[0].cause.name == "epsilon"


@pytest.mark.parametrize("pure", [True, False])
def test_pure_batches_of_images_are_found_by_mixing(pure, lenient):
    """Pixels differ more than images, so by counting examples no batch looks pure."""
    random = np.random.default_rng(0)
    classes = np.arange(32) % 4 if pure else random.integers(0, 4, (32, 16))
    levels = 0.3 * np.broadcast_to(classes.reshape(32, -1), (32, 16))
    images = (random.normal(size=(32, 16, 5, 5, 3)) + levels[..., None, None, None]).astype("f4")
    model = nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    model(images.reshape(-1, 3))
    report = explain_nnx(lambda model, x: model(x), model, images)
    assert [finding.cause.name for finding in report.findings] == ["pure batches"] * pure
    moments = [{"norm": bn.measure(x)} for x in images]
    state = bn.population(moments, estimator="pooled")
    assert explain(state, moments, batch_size=16).rows["norm"].purity < 3  # as it is documented


def test_rare_features_do_not_make_a_lag():
    """Pixels at the border: most never differ from 0, and some do in one image of thousands."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 32, 40)).astype(np.float32)
    x[..., :25] = 0
    x[random.integers(0, 100, 5), 3, np.arange(20, 25)] = 1  # long ago, for a running average
    state = bn.BatchNormState(x[100:].mean((0, 1)), x[100:].var((0, 1)), np.full(40, 100))
    moments = [{"norm": bn.Moments(b.mean(0), b.var(0), np.full(40, 32.0, np.float32))} for b in x]
    report = explain({"norm": state}, moments, batch_size=32)
    row = report.rows["norm"]
    assert (row.dead, row.new, row.of_features.rare.sum()) == (20, 5, 5)
    assert [finding.cause.name for finding in report.findings] == ["dead features"]


def test_what_cannot_be_mixed_is_left():
    from bn_jax.explain.mixing import mix

    a, b = (
        {"x": np.arange(6).reshape(3, 2), "y": np.arange(3)},
        {"x": np.ones((3, 2)), "y": -np.ones(3)},
    )
    mixed = mix([a, b])
    assert [sorted(part) for part in (mixed[0], mixed[1])] == [["x", "y"]] * 2
    pairs = {(tuple(x), y) for part in mixed for x, y in zip(part["x"], part["y"], strict=True)}
    assert pairs == {((0, 1), 0), ((2, 3), 1), ((4, 5), 2), ((1, 1), -1)}  # y goes with its x
    assert mix([a]) == mix([a, {"x": np.ones((2, 2)), "y": np.ones(2)}]) == []
    assert mix([{"x": np.ones(3), "key": np.ones(2)}] * 2) == mix([{"scalar": 1.0}] * 2) == []


class Wrapped(nn.Module):
    norm: nn.Module

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("left_on", [True, False])
def test_the_train_flag(api, left_on, lenient):
    """The statistics are right; what normalizes by the batch is the function that evaluates."""
    mean, var = HEALTHY[:, 0].mean((0, 1)), HEALTHY[:, 0].var((0, 1))
    if api == "linen":
        layer = nn.BatchNorm()
        scale = {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}
        variables = {"params": scale, "batch_stats": {"mean": mean, "var": var}}
        model = Wrapped(nn.BatchNorm(use_running_average=False))
        variables = {kind: {"norm": leaves} for kind, leaves in variables.items()}

        def forward(variables, x):
            return model.apply(variables, x, mutable=["batch_stats"])

        def evaluate(variables, x):
            flat = {kind: leaves["norm"] for kind, leaves in variables.items()}
            options = {"mutable": ["batch_stats"]} if left_on else {}
            y = layer.apply(flat, x, use_running_average=not left_on, **options)
            return y[0] if left_on else y

        report = explain_linen(forward, variables, HEALTHY[:, 0], evaluate=evaluate)
    else:
        model = nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))
        model.mean.set_value(jnp.asarray(mean))
        model.var.set_value(jnp.asarray(var))
        report = explain_nnx(
            lambda model, x: model(x),
            model,
            HEALTHY[:, 0],
            evaluate=lambda model, x: model(x, use_running_average=not left_on),
        )
        np.testing.assert_array_equal(model.mean.get_value(), mean)  # it stays as it is
    names = [finding.cause.name for finding in report.findings]
    assert names == ["train flag"] * left_on
    assert report.verdict.startswith("train flag: " if left_on else "Nothing wrong")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="there are no batches"):
        explain(NEW, [], batch_size=SIZE)
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    x = np.ones((32, 3), np.float32)
    for batches in ((x,), ([x], x)):
        with pytest.raises(ValueError, match=r"one array of shape \(32, 3\), .* \[x\] for one"):
            explain_nnx(lambda model, x: model(x), model, *batches)
