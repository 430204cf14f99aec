"""haiku's params and state: what they mean to us, and that haiku agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.core.state import LOADED
from bn_jax.interop.haiku import from_haiku, to_haiku
from tests.interop.follow import (
    FEATURES,
    assert_close,
    assert_same,
    batches,
    follow,
    targets,
    vectors,
)

SETTINGS = {"average": bn.DebiasedEma(0.9), "epsilon": 1e-5, "unbiased": False}


def ours(count=3):
    scale, bias, mean, var = map(jnp.asarray, vectors())
    counts = jnp.full(FEATURES, count, jnp.int32)
    return bn.BatchNormParams(scale, bias), bn.BatchNormState(mean, var, counts)


@pytest.mark.parametrize("count", [1, 3, 100_000])
@pytest.mark.parametrize("shape", [{"ndim": 2}, {"ndim": 4}, {"ndim": 4, "axis": 1}])
def test_from_ours_and_back_changes_nothing(count, shape):
    params, state = ours(count)
    theirs, memory, made = to_haiku(params, state, SETTINGS, "net/bn", **shape)
    assert made == {"create_scale": True, "create_offset": True, "decay_rate": 0.9, "eps": 1e-5}
    back = from_haiku(theirs, memory, "net/bn", decay_rate=0.9)
    jax.tree.map(assert_same, back[:2], (params, state))
    assert back[2] == SETTINGS


def test_hidden_is_the_average_with_its_bias():
    params, state = ours(2)
    _, memory, _ = to_haiku(params, state, SETTINGS, ndim=2)
    ema = memory["batch_norm/~/var_ema"]
    assert ema["counter"] == 2
    np.testing.assert_allclose(ema["hidden"][0], state.var * (1 - 0.9**2), rtol=1e-6)


def test_without_scale_and_offset():
    _, state = ours()
    theirs, memory, made = to_haiku(bn.BatchNormParams(None, None), state, SETTINGS, ndim=2)
    assert theirs == {}
    assert not made["create_scale"]
    assert from_haiku(theirs, memory, decay_rate=0.9)[0] == (None, None)


def test_an_average_without_debiasing_is_an_ema():
    params, state = ours()
    theirs, memory, _ = to_haiku(params, state, SETTINGS, ndim=2)
    for entry in memory.values():
        entry["hidden"] = entry["average"]
    _, _, settings = from_haiku(theirs, memory, decay_rate=0.9, zero_debias=False)
    assert settings["average"] == bn.Ema(0.9)
    with pytest.raises(ValueError, match=r"mean_ema.hidden: is .* zero_debias"):
        from_haiku(theirs, memory, decay_rate=0.9)


def test_hidden_and_average_agree_to_five_digits():
    """Of average, more than float32 loses (1e-6); hidden is .271 of it at decay .9 after 3."""
    theirs, memory, _ = to_haiku(*ours(3), SETTINGS, ndim=2)
    ema = memory["batch_norm/~/mean_ema"]
    hidden = ema["hidden"]
    ema["hidden"] = hidden * (1 + 5e-6)
    from_haiku(theirs, memory, decay_rate=0.9)
    ema["hidden"] = hidden * (1 + 1e-4)
    with pytest.raises(ValueError, match=r"mean_ema.hidden: is"):
        from_haiku(theirs, memory, decay_rate=0.9)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_a_wrong_decay_is_found_out(count):
    theirs, memory, _ = to_haiku(*ours(count), SETTINGS, ndim=2)
    with pytest.raises(ValueError, match=r"decay_rate=0.99"):
        from_haiku(theirs, memory, decay_rate=0.99)


def test_statistics_of_unknown_age_are_old():
    """haiku divides by 1 - decayᵗ, and would forget what has no count."""
    params, state = ours(0)
    _, memory, _ = to_haiku(params, state, SETTINGS, ndim=2)
    assert memory["batch_norm/~/mean_ema"]["counter"] == LOADED
    assert_same(memory["batch_norm/~/mean_ema"]["hidden"][0], state.mean)
    _, memory, _ = to_haiku(params, state, SETTINGS, ndim=2, count=2)
    assert memory["batch_norm/~/mean_ema"]["counter"] == 2
    new = bn.init(FEATURES)
    assert to_haiku(*new, SETTINGS, ndim=2)[1]["batch_norm/~/var_ema"]["counter"] == 0


def haiku_layer(shape, **arguments):
    hk = pytest.importorskip("haiku")
    arguments = {
        "create_scale": True, "create_offset": True, "decay_rate": 0.9, **arguments,
    }  # fmt: skip

    def forward(x, train):
        return hk.BatchNorm(**arguments)(x, train)

    layer = hk.without_apply_rng(hk.transform_with_state(forward))
    return layer, *layer.init(None, jnp.zeros(shape), True)


def train_haiku(layer, params, state, xs):
    def loss(params, state, x, target):
        y, state = layer.apply(params, state, x, True)
        return jnp.mean((y - target) ** 2), state

    for x, target in zip(xs, targets(xs), strict=True):
        gradients, state = jax.grad(loss, has_aux=True)(params, state, x, target)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    return params, state


@pytest.mark.peer
@pytest.mark.parametrize(("steps", "arguments"), [
    (1, {}),
    (6, {"decay_rate": 0.999, "eps": 1e-2}),
    (3, {"create_scale": False, "create_offset": False}),
    (6, {"create_offset": False, "data_format": "channels_first"}),
])  # fmt: skip
def test_ours_goes_on_where_haiku_is_and_back(lenient, steps, arguments):
    first = "data_format" in arguments
    shape, axis = ((8, FEATURES, 4, 3), 1) if first else ((32, FEATURES), -1)
    layer, params, state = haiku_layer(shape, **arguments)
    params, state = train_haiku(layer, params, state, batches(steps, shape, axis=axis))
    words = {key: value for key, value in arguments.items() if key == "eps"}
    words["decay_rate"] = arguments.get("decay_rate", 0.9)
    converted = from_haiku(params, state, **words)

    back = to_haiku(*converted, ndim=len(shape), axis=axis)
    assert jax.tree.structure(back[:2]) == jax.tree.structure((dict(params), dict(state)))
    jax.tree.map(assert_same, dict(back[0]), dict(params))
    for name, entry in state.items():
        assert_same(back[1][name]["average"], entry["average"])
        assert_same(back[1][name]["counter"], entry["counter"])
        # average = hidden/f was rounded once, and so is average·f: within two units of the last.
        np.testing.assert_allclose(back[1][name]["hidden"], entry["hidden"], rtol=2**-22, atol=0)

    for memory in (state, back[1]):
        now = [memory]

        def train(x, now=now):
            y, now[0] = layer.apply(params, now[0], x, True)
            return y

        def read(now=now):
            return [now[0][f"batch_norm/~/{key}_ema"]["average"].ravel() for key in ("mean", "var")]

        # haiku computes 1 - decay and 1 - decayᵗ in float32, each to half an eps of 1: its averages
        # are good to eps / (1 - decay) after few steps.
        bar = max(1e-5, 2**-23 / (1 - words["decay_rate"]))
        follow(
            converted, lambda x, now=now: layer.apply(params, now[0], x, False)[0], train,
            batches(2, shape, seed=5, axis=axis), axis=axis, read=read, bar=bar,
        )  # fmt: skip


@pytest.mark.peer
def test_an_ema_of_another_library_evaluates_the_same_in_haiku(lenient):
    params, state = ours(0)
    settings = {"average": bn.Ema(0.9), "epsilon": 1e-3, "unbiased": False}
    theirs, memory, made = to_haiku(params, state, settings, ndim=2, count=1000)
    layer, _, _ = haiku_layer((4, FEATURES), **made)
    x = jnp.asarray(batches(1)[0])
    y, _ = bn.batch_norm(x, params, state, train=False, epsilon=1e-3)
    assert_close(y, layer.apply(theirs, memory, x, False)[0])
