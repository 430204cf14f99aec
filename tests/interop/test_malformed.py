"""What is no batch norm's checkpoint is refused, by its key and with a remedy. No peer needed."""

import pickle
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.interop.checks import CheckpointError
from bn_jax.interop.equinox import from_equinox
from bn_jax.interop.flax import from_flax, to_flax
from bn_jax.interop.haiku import from_haiku, to_haiku
from bn_jax.interop.keras import from_keras, to_keras
from bn_jax.interop.torch import from_torch, to_torch

FLOATS = np.ones(3, np.float32)


class Trap:
    """A pickle of this would write to where it says."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return self.sprung.append, (1,)


SPRUNG = []
BAD = {
    "NaN": (np.array([1, np.nan, 1], np.float32), "is nan for feature 1 of 3; .*diverged"),
    "infinity": (np.array([1, np.inf, 1], np.float32), "is inf for feature 1"),
    "another shape": (np.ones(4, np.float32), r"has shape \(.*; all hold one value per feature"),
    "two axes": (np.ones((3, 1), np.float32), r"has shape \(3, 1\)"),
    "integers": (np.ones(3, int), "has dtype int64; .*quantized"),
    "bools": (np.ones(3, bool), "of dtype bool"),
    "objects": (np.array([Trap(SPRUNG)] * 3, object), "of dtype object.*may hide a pickle"),
    "a pickle": (pickle.dumps([1, 2]), "is bytes, not an array; nothing is unpickled"),
    "text": ("1, 2, 3", "is str, not an array"),
    "a dict": ({"a": 1}, "is dict of dtype object"),
    "ragged rows": ([[1.0], [1.0, 2.0]], "is no array"),
}
NEGATIVE = np.array([1, -1e-3, 1], np.float32)


def torch_of(**values):
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return lambda: from_torch({f"bn.{names[key]}": value for key, value in values.items()}, "bn")


def keras_of(**values):
    names = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
    return lambda: from_keras({names[key]: value for key, value in values.items()})


def haiku_of(**values):
    def row(value):
        return value[None] if isinstance(value, np.ndarray) and value.ndim == 1 else value

    names = {"scale": "scale", "bias": "offset"}
    params = {names[k]: row(v) for k, v in values.items() if k in names}
    state = {
        f"bn/~/{key}_ema": {"counter": 10**6, "average": row(value), "hidden": row(value)}
        for key, value in values.items()
        if key not in names
    }
    return lambda: from_haiku({"bn": params}, state, "bn", decay_rate=0.9)


def flax_of(**values):
    collections = {
        "params": {"bn": {k: v for k, v in values.items() if k in ("scale", "bias")}},
        "batch_stats": {"bn": {k: v for k, v in values.items() if k not in ("scale", "bias")}},
    }
    return lambda: from_flax(collections, "bn")


def equinox_of(**values):
    layer = SimpleNamespace(
        mode="ema", momentum=0.9, eps=1e-5, weight=values.get("scale"), bias=values.get("bias"),
        ema_first_time_index="first", ema_state_index="pair",
    )  # fmt: skip
    state = {"first": np.array(False), "pair": (values["mean"], values["var"])}
    return lambda: from_equinox(layer, state)


FROM = {
    "torch": (torch_of, {"scale": "bn.weight", "bias": "bn.bias", "mean": "bn.running_mean",
                         "var": "bn.running_var"}),
    "keras": (keras_of, {"scale": "gamma", "bias": "beta", "mean": "moving_mean",
                         "var": "moving_variance"}),
    "haiku": (haiku_of, {"scale": "bn.scale", "bias": "bn.offset", "mean": "bn/~/mean_ema.average",
                         "var": "bn/~/var_ema.average"}),
    "flax": (flax_of, {"scale": "bn.scale", "bias": "bn.bias", "mean": "bn.mean", "var": "bn.var"}),
    "equinox": (equinox_of, {"scale": "weight", "bias": "bias", "mean": "mean of mode='ema'",
                             "var": "var of mode='ema'"}),
}  # fmt: skip


def good():
    return {"scale": FLOATS, "bias": FLOATS, "mean": FLOATS, "var": FLOATS}


@pytest.mark.parametrize("library", FROM)
def test_what_is_well_formed_is_taken(library):
    make, _ = FROM[library]
    params, state, _ = make(**good())()
    for value in (*params, state.mean, state.var):
        np.testing.assert_array_equal(value, FLOATS)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("field", ["scale", "bias", "mean", "var"])
@pytest.mark.parametrize("library", FROM)
def test_a_bad_value_is_refused_by_its_key(library, field, bad):
    make, keys = FROM[library]
    value, message = BAD[bad]
    if bad == "two axes" and library in ("haiku", "flax"):
        return  # haiku's own form; and flax has as many feature axes as it likes
    with pytest.raises(CheckpointError, match=message) as caught:
        make(**good() | {field: value})()
    # The mean sets the shape: it is the others that differ from it.
    named = str(caught.value)
    assert keys[field] in named
    assert ";" in named
    assert not SPRUNG


@pytest.mark.parametrize("library", FROM)
def test_a_negative_variance_is_refused(library):
    make, keys = FROM[library]
    with pytest.raises(
        CheckpointError, match=r"is -0.001\d* for feature 1 of 3; no variance"
    ) as caught:
        make(**good() | {"var": NEGATIVE})()
    assert keys["var"] in str(caught.value)


@pytest.mark.parametrize("field", ["mean", "var"])
@pytest.mark.parametrize("library", ["torch", "keras", "haiku", "flax"])
def test_missing_statistics_are_refused(library, field):
    make, keys = FROM[library]
    values = good()
    del values[field]
    with pytest.raises(CheckpointError, match="is missing among") as caught:
        make(**values)()
    assert keys[field].removesuffix(".average").rpartition(".")[2] in str(caught.value)


def entries(count=7):
    names = ("weight", "bias", "running_mean", "running_var")
    return dict.fromkeys(names, FLOATS) | {"num_batches_tracked": np.array(count)}


@pytest.mark.parametrize(("attempt", "message"), [
    (lambda: from_torch(entries() | {"running_std": FLOATS}),
     "'running_std': is no entry of a batch norm; give the name"),
    (lambda: from_torch({f"net.bn1.{k}": v for k, v in entries().items()}),
     "no entry of a batch norm.*these have statistics: 'net.bn1'"),
    (lambda: from_torch({f"net.bn1.{k}": v for k, v in entries().items()}, "net.bn2"),
     "net.bn2.running_mean: is missing.*these have statistics: 'net.bn1'"),
    (lambda: from_torch({"weight": FLOATS, "bias": FLOATS}),
     "track_running_stats=False has none"),
    (lambda: from_torch(entries(-1)), "num_batches_tracked: is -1 .*integer from 0"),
    (lambda: from_torch(entries(2**31)), "num_batches_tracked: is 2147483648"),
    (lambda: from_torch(entries(1.5)), "num_batches_tracked: is 1.5 of dtype float64"),
    (lambda: from_torch(entries(np.ones(2, int))), r"num_batches_tracked: has shape \(2,\)"),
    (lambda: from_torch(pickle.dumps(entries())), "is bytes, no mapping.*nothing is unpickled"),
    (lambda: from_torch(SimpleNamespace()), r"pass model.state_dict\(\)"),
    (lambda: from_keras([FLOATS] * 3), "are three.*say which by scale=False or center=False"),
    (lambda: from_keras([FLOATS] * 7), "are 7 arrays; .*With renorm=True, pass the first four"),
    (lambda: from_keras([FLOATS] * 4, scale=False), "are 4 arrays, not"),
    (lambda: from_keras(pickle.dumps([1])), "are bytes, neither.*nothing is unpickled"),
    (lambda: from_keras({"moving_mean": FLOATS, "moving_variance": FLOATS}, scale=True),
     "gamma: is missing"),
    (lambda: from_keras({"renorm_mean": FLOATS}), "'renorm_mean': is no entry"),
    (lambda: from_haiku({}, {"a/~/mean_ema": {}}, "b", decay_rate=0.9),
     "b/~/mean_ema: is missing.*state has these: 'a'"),
    (lambda: from_haiku({}, {f"b/~/{key}_ema": FLOATS for key in ("mean", "var")}, "b",
                        decay_rate=0.9), "b/~/mean_ema: is ndarray, no mapping"),
    (lambda: from_haiku(b"", {}, decay_rate=0.9), "params: is bytes, no mapping"),
    (lambda: from_flax(b"batch_stats"), "variables: is bytes, no mapping.*unpickled"),
    (lambda: from_keras([FLOATS, np.array([1, 1e300, 1])]), "is inf for feature 1"),
    (lambda: from_haiku({"b": {"w": FLOATS}}, {}, "b", decay_rate=0.9), "'w': is no entry"),
    (lambda: from_flax({"params": {}}), "batch_stats: is missing"),
    (lambda: from_flax({"batch_stats": {"a": {}}}, "b/c"), "batch_stats/b: is missing among 'a'"),
    (lambda: from_flax({"batch_stats": {"a": {}}}), "'a': is no entry.*keys down to one as path"),
    (lambda: from_flax({"batch_stats": {"a": 1}}, "a"), "batch_stats/a: is int, no mapping"),
    (lambda: from_equinox("a layer", {}), "layer: is str, no equinox.nn.BatchNorm"),
])  # fmt: skip
def test_a_wrong_structure_is_refused(attempt, message):
    with pytest.raises(CheckpointError, match=message):
        attempt()


def test_haiku_averages_of_two_checkpoints_are_refused():
    def ema(counter, hidden=FLOATS):
        return {"counter": counter, "average": FLOATS[None], "hidden": hidden[None]}

    state = {"bn/~/mean_ema": ema(10**6), "bn/~/var_ema": ema(10**6 + 1)}
    with pytest.raises(CheckpointError, match=r"var_ema.counter: is 1000001, that of mean_ema"):
        from_haiku({}, state, "bn", decay_rate=0.9)
    state = {"bn/~/mean_ema": ema(10**6), "bn/~/var_ema": ema(10**6, np.ones(2))}
    with pytest.raises(CheckpointError, match=r"var_ema.hidden: has shape \(1, 2\)"):
        from_haiku({}, state, "bn", decay_rate=0.9)


SETTINGS = {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": True}
TO = {
    "torch": to_torch, "keras": to_keras, "flax": to_flax,
    "haiku": lambda *ours, **more: to_haiku(*ours, ndim=2, **more),
}  # fmt: skip


@pytest.mark.parametrize("library", TO)
@pytest.mark.parametrize(("field", "value", "message"), [
    ("mean", jnp.array([0, jnp.nan, 0]), "state.mean: is nan for feature 1"),
    ("var", jnp.array([0.0, -1, 0]), "state.var: is -1.0 for feature 1"),
    ("var", jnp.ones(4), r"state.var: has shape \(4,\), but state.mean \(3,\)"),
    ("count", jnp.ones(3), "state.count: is .* of dtype float32"),
])  # fmt: skip
def test_our_own_state_is_checked_before_it_is_written(library, field, value, message):
    params, state = bn.init(3)
    with pytest.raises(CheckpointError, match=message):
        TO[library](params, state._replace(**{field: value}), SETTINGS)


@pytest.mark.parametrize("library", TO)
def test_settings_that_the_other_has_not_are_refused(library):
    ours = bn.init(3)
    own = lambda count: 0.5  # noqa: E731
    with pytest.raises(CheckpointError, match=r"settings\['average'\].*choose how"):
        TO[library](*ours, SETTINGS | {"average": own})
    with pytest.raises(ValueError, match="values_per_feature=1 must be above 1"):
        TO[library](*ours, SETTINGS, values_per_feature=1)
    with pytest.raises(ValueError, match="epsilon=-1"):
        TO[library](*ours, SETTINGS | {"epsilon": -1})


@pytest.mark.parametrize("library", ["torch", "haiku"])
def test_counts_that_differ_are_asked_for(library):
    params, state = bn.init(3)
    state = state._replace(count=jnp.array([3, 4, 3]))
    with pytest.raises(CheckpointError, match=r"differs between features, 3, 4; .*count="):
        TO[library](params, state, SETTINGS)
    TO[library](params, state, SETTINGS, count=4)


def test_several_feature_axes_are_for_flax_alone():
    ours = bn.init((2, 3))
    to_flax(*ours, SETTINGS)
    with pytest.raises(CheckpointError, match=r"state.mean: has shape \(2, 3\).*reshape"):
        to_torch(*ours, SETTINGS)
    row = {"counter": 10**6, "average": np.ones((2, 3)), "hidden": np.ones((2, 3))}
    state = dict.fromkeys(("bn/~/mean_ema", "bn/~/var_ema"), row)
    with pytest.raises(CheckpointError, match=r"has shape \(2, 3\).*flatten"):
        from_haiku({}, state, "bn", decay_rate=0.9)


@pytest.mark.parametrize("attempt", [
    lambda: from_torch(entries(), momentum=1.1), lambda: from_torch(entries(), momentum=-0.1),
    lambda: from_keras([FLOATS] * 4, momentum=2),
])  # fmt: skip
def test_momentum_is_a_weight(attempt):
    with pytest.raises(ValueError, match=r"is outside of \[0, 1\]"):
        attempt()


@pytest.mark.parametrize("settings", ["bn1", {"average": bn.Ema(0.9)}, None])
def test_settings_that_are_none(settings):
    with pytest.raises(TypeError, match="give a dict of average, epsilon and unbiased"):
        to_torch(*bn.init(2), settings)
