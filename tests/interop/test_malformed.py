"""What is no batch norm's checkpoint is refused, by its key and with a remedy. No peer needed."""

import pickle
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.core import state as core_state
from bn_jax.interop.checks import CheckpointError, read_statistic, some
from bn_jax.interop.counts import read_count, read_one_count
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
    "ragged rows": ([[1.0], [1.0, 2.0]], "is not an array"),
    "masked": (np.ma.array(FLOATS, mask=[0, 1, 0]), "has 1 masked values of 3; .*filled"),
    "time spans": (FLOATS.astype("m8[s]"), r"of dtype timedelta64"),
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


@pytest.mark.parametrize("field", ["mean", "var"])
@pytest.mark.parametrize("library", FROM)
def test_none_is_no_statistic(library, field):
    make, keys = FROM[library]
    with pytest.raises(CheckpointError, match=f"{keys[field]}: is None; an array of numbers"):
        make(**good() | {field: None})()


@pytest.mark.parametrize("library", FROM)
def test_a_complex_variance_is_refused(library):
    make, keys = FROM[library]
    with pytest.raises(CheckpointError, match="has dtype complex64; one floating") as caught:
        make(**good() | {"var": FLOATS.astype(np.complex64)})()
    assert keys["var"] in str(caught.value)
    _, state, _ = make(**good() | {"mean": FLOATS.astype(np.complex64)})()
    assert state.mean.dtype == jnp.complex64


TAKEN = {
    "the other order of bytes": FLOATS.astype(FLOATS.dtype.newbyteorder()),
    "long double": FLOATS.astype(np.longdouble),
    "a list": [1.0, 1, np.float32(1)],
    "a list of arrays": [jnp.float32(1), np.ones(()), 1.0],
    "a mask that masks nothing": np.ma.array(FLOATS, mask=[0, 0, 0]),
    "a stride": np.ones(6, np.float32)[::2],
    "float16": FLOATS.astype(np.float16),
    "bfloat16": FLOATS.astype(jnp.bfloat16),
    "float8": FLOATS.astype(jnp.float8_e5m2),
}


@pytest.mark.parametrize("form", TAKEN)
def test_numbers_in_any_form_are_taken(form):
    """The statistics in float32 at least, which holds all of them exactly."""
    for make, _ in (FROM["torch"], FROM["keras"]):
        params, state, _ = make(**dict.fromkeys(good(), TAKEN[form]))()
        for value in (*params, state.mean, state.var):
            np.testing.assert_array_equal(np.asarray(value, np.float32), FLOATS)
        assert state.mean.dtype == state.var.dtype == np.float32


def test_long_double_keeps_double_where_it_is_enabled(x64):
    for wide, double in ((np.longdouble, np.float64), (np.clongdouble, np.complex128)):
        read = read_statistic("mean", np.ones(2, wide) + 1e-15)
        assert read.dtype == double
        np.testing.assert_array_equal(read, 1 + 1e-15)


@pytest.mark.parametrize(("dtype", "value", "message"), [
    (np.float16, np.inf, "is inf for .*float16 holds no more than 65504: save .* in float32"),
    (np.float16, np.nan, "is nan for .*diverged"),
    (np.float32, np.inf, "is inf for .*diverged"),
    (jnp.bfloat16, np.inf, "is inf for .*diverged"),
    (np.float64, 1e300, r"is 1e\+300 for .*float32 holds no more than 3.4e\+38: set"),
    (np.float64, np.inf, "is inf for .*diverged"),
])  # fmt: skip
def test_what_does_not_fit_has_not_diverged(dtype, value, message):
    """A variance of 1e5 is nothing bad in float32, and infinity in float16."""
    with pytest.raises(CheckpointError, match=message):
        torch_of(**good() | {"var": np.array([1, value, 1]).astype(dtype)})()


# Statistics that were loaded have been seen: their count is not 0, whatever the file says.


LOADED = {"mean": np.full(3, 5, np.float32), "var": np.full(3, 4, np.float32)}


@pytest.mark.parametrize("library", ["torch", "keras", "haiku", "flax", "equinox"])
@pytest.mark.parametrize("average", [bn.DebiasedEma(0.99), bn.CumulativeAverage()])
def test_loaded_statistics_survive_the_first_step(library, average):
    make, _ = FROM[library]
    params, state, settings = make(**good() | LOADED)()
    x = jnp.array([[0.0], [2.0]]) * jnp.ones((2, 3))
    _, after = bn.batch_norm(x, params, state, train=True, **settings | {"average": average})
    assert (after.mean >= 0.99 * 5 - 1e-5).all()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_count_of_zero_beside_statistics_is_no_count(momentum):
    bare = {"running_mean": LOADED["mean"], "running_var": LOADED["var"]}
    for found in (bare, bare | {"num_batches_tracked": np.array(0)}):
        _, state, _ = from_torch(found, momentum=momentum)
        assert state.count.tolist() == [core_state.LOADED] * 3
        assert from_torch(bare, momentum=momentum, count=7)[1].count.tolist() == [7] * 3
    new = {"running_mean": np.zeros(3), "running_var": np.ones(3), "num_batches_tracked": 0}
    assert from_torch(new)[1].count.tolist() == [0] * 3


def test_of_counts_per_feature_each_is_looked_at():
    stats = {"mean": np.zeros(4), "var": np.array([1.0, 0, 4, 4]), "count": np.array([0, 0, 0, 3])}
    assert from_flax({"batch_stats": stats})[1].count.tolist() == [0, 0, core_state.LOADED, 3]


def test_a_count_is_a_whole_number_up_to_int32():
    most = np.iinfo(np.int32).max
    assert read_count("count", np.array(most, ">i8")).tolist() == most
    assert read_count("count", 0).dtype == np.int32
    with pytest.raises(CheckpointError, match="count: is 2147483648"):
        read_count("count", most + 1)
    with pytest.raises(CheckpointError, match=r"timedelta64.*not an array of numbers"):
        read_count("count", np.timedelta64(3, "s"))
    with pytest.raises(CheckpointError, match=r"counter: has shape \(2,\); one number"):
        read_one_count("counter", [3, 3])


def test_lists_in_messages_have_as_many_as_fit():
    assert some("abcdef") == "'a', 'b', 'c', 'd', 'e', 'f'"
    assert some("abcdefg").endswith("'f' and 1 more")


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
     "'running_std': is not an entry of a batch norm; give the name"),
    (lambda: from_torch({f"net.bn1.{k}": v for k, v in entries().items()}),
     "not an entry of a batch norm.*these have statistics: 'net.bn1'"),
    (lambda: from_torch({f"net.bn1.{k}": v for k, v in entries().items()}, "net.bn2"),
     "net.bn2.running_mean: is missing.*these have statistics: 'net.bn1'"),
    (lambda: from_torch({"weight": FLOATS, "bias": FLOATS}),
     "track_running_stats=False has none"),
    (lambda: from_torch(entries(-1)), "num_batches_tracked: is -1 .*integer from 0"),
    (lambda: from_torch(entries(2**31)), "num_batches_tracked: is 2147483648"),
    (lambda: from_torch(entries(1.5)), "num_batches_tracked: is 1.5 of dtype float64"),
    (lambda: from_torch(entries(np.ones(2, int))), r"num_batches_tracked: has shape \(2,\)"),
    (lambda: from_torch(pickle.dumps(entries())), "is bytes, not a mapping.*nothing is unpickled"),
    (lambda: from_torch(SimpleNamespace()), r"pass model.state_dict\(\)"),
    (lambda: from_keras([FLOATS] * 3), "are three.*pass scale=False or center=False"),
    (lambda: from_keras([FLOATS] * 7), "are 7 arrays; .*With renorm=True, pass the first four"),
    (lambda: from_keras([FLOATS] * 4, scale=False), "are 4 arrays, not"),
    (lambda: from_keras(pickle.dumps([1])), "are bytes, neither.*nothing is unpickled"),
    (lambda: from_keras({"moving_mean": FLOATS, "moving_variance": FLOATS}, scale=True),
     "gamma: is missing"),
    (lambda: from_keras({"renorm_mean": FLOATS}), "'renorm_mean': is not an entry"),
    (lambda: from_haiku({}, {"a/~/mean_ema": {}}, "b", decay_rate=0.9),
     "b/~/mean_ema: is missing.*state has these: 'a'"),
    (lambda: from_haiku({}, {f"b/~/{key}_ema": FLOATS for key in ("mean", "var")}, "b",
                        decay_rate=0.9), "b/~/mean_ema: is ndarray, not a mapping"),
    (lambda: from_haiku(b"", {}, decay_rate=0.9), "params: is bytes, not a mapping"),
    (lambda: from_flax(b"batch_stats"), "variables: is bytes, not a mapping.*unpickled"),
    (lambda: from_torch({0: FLOATS}), "'0': is not an entry of a batch norm"),
    (lambda: from_haiku({"b": {"w": FLOATS}}, {}, "b", decay_rate=0.9), "'w': is not an entry"),
    (lambda: from_flax({"params": {}}), "batch_stats: is missing"),
    (lambda: from_flax({"batch_stats": {"a": {}}}, "b/c"), "batch_stats/b: is missing among 'a'"),
    (lambda: from_flax({"batch_stats": {"a": {}}}), "'a': is not an entry.*keys down to one as"),
    (lambda: from_flax({"batch_stats": {"a": 1}}, "a"), "batch_stats/a: is int, not a mapping"),
    (lambda: from_equinox("a layer", {}), "layer: is str, not an equinox.nn.BatchNorm"),
])  # fmt: skip
def test_a_wrong_structure_is_refused(attempt, message):
    with pytest.raises(CheckpointError, match=message):
        attempt()


def test_haiku_averages_of_two_checkpoints_are_refused():
    def ema(counter, hidden=FLOATS):
        return {"counter": counter, "average": FLOATS[None], "hidden": hidden[None]}

    state = {"bn/~/mean_ema": ema(10**6), "bn/~/var_ema": ema(10**6 + 1)}
    with pytest.raises(CheckpointError, match=r"var_ema.counter: is 1000001, but that of mean_ema"):
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
    ("count", jnp.full(3, 0.5), "state.count: is .* of dtype float32"),
])  # fmt: skip
def test_our_own_state_is_checked_before_it_is_written(library, field, value, message):
    params, state = bn.init(3)
    with pytest.raises(CheckpointError, match=message):
        TO[library](params, state._replace(**{field: value}), SETTINGS)


@pytest.mark.parametrize("library", TO)
def test_what_is_written_is_ours_and_in_order(library):
    params, state = bn.init(3)
    with pytest.raises(TypeError, match=r"params is BatchNormState, but must .* in this order"):
        TO[library](state, params, SETTINGS)
    for field in ("mean", "var", "count"):
        with pytest.raises(CheckpointError, match=f"state.{field}: is None"):
            TO[library](params, state._replace(**{field: None}), SETTINGS)


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
