"""equinox' layer and State: what they mean to us, and that equinox agrees."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.interop.equinox import FirstThenEma, from_equinox, to_equinox
from tests.interop.follow import FEATURES, assert_close, assert_same, batches, targets, vectors


def pretended(mode="batch", count=3, decay=0.9):
    """A layer and a State, without equinox."""
    scale, bias, mean, var = map(jnp.asarray, vectors())
    layer = SimpleNamespace(
        mode=mode, momentum=decay, eps=1e-5, weight=scale, bias=bias, batch_counter="counter",
        batch_state_index="hidden", ema_first_time_index="first", ema_state_index="ema",
    )  # fmt: skip
    return layer, {
        "counter": count, "hidden": (mean, var), "first": np.array(count == 0), "ema": (mean, var),
    }  # fmt: skip


def test_hidden_is_divided_as_equinox_does():
    layer, state = pretended()
    _, ours, settings = from_equinox(layer, state)
    np.testing.assert_allclose(ours.mean, vectors()[2] / (1 - 0.9**3), rtol=1e-6)
    np.testing.assert_allclose(ours.var, vectors()[3] / (1 - 0.9**3), rtol=1e-6)
    assert ours.count.tolist() == [3] * FEATURES
    assert settings == {"average": bn.DebiasedEma(0.9), "epsilon": 1e-5, "unbiased": False}


def test_the_initial_variance_can_be_removed():
    layer, state = pretended()
    mean, var = state["hidden"]
    state["hidden"] = (mean, 0.9**3 + (1 - 0.9**3) * var)  # one of (0, 1), three of var
    _, ours, _ = from_equinox(layer, state, remove_initial_variance=True)
    np.testing.assert_allclose(ours.var, var, rtol=1e-5)


def test_mode_ema_is_taken_as_it_is():
    layer, state = pretended("ema")
    _, ours, settings = from_equinox(layer, state)
    assert_same(ours.mean, vectors()[2])
    assert settings["average"] == FirstThenEma(0.9)
    layer, state = pretended("ema", count=0)
    state["ema"] = (jnp.full(FEATURES, jnp.nan),) * 2  # equinox leaves memory as it finds it
    _, ours, _ = from_equinox(layer, state)
    assert (ours.mean == 0).all()
    assert (ours.var == 1).all()
    assert (ours.count == 0).all()


def equinox_layer(mode="batch", **arguments):
    eqx = pytest.importorskip("equinox")
    return eqx, *eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        FEATURES, axis_name="batch", mode=mode, **{"momentum": 0.9, **arguments}
    )


def apply(layer, state, x, train):
    return jax.vmap(
        lambda x, state: layer(x, state, inference=not train),
        axis_name="batch", in_axes=(0, None), out_axes=(0, None),
    )(x, state)  # fmt: skip


def train_equinox(eqx, layer, state, xs):
    def loss(layer, state, x, target):
        y, state = apply(layer, state, x, True)
        return jnp.mean((y - target) ** 2), state

    for x, target in zip(xs, targets(xs), strict=True):
        gradients, state = eqx.filter_grad(loss, has_aux=True)(layer, state, x, target)
        layer = eqx.apply_updates(layer, jax.tree.map(lambda g: -0.1 * g, gradients))
    return layer, state


def evaluated(layer, state):
    """The statistics by which equinox evaluates, from its own formula."""
    if layer.mode == "ema":
        return state.get(layer.ema_state_index)
    counter = state.get(layer.batch_counter)
    scale = jnp.where(counter == 0, 1, 1 - layer.momentum**counter)
    return tuple(hidden / scale for hidden in state.get(layer.batch_state_index))


@pytest.mark.peer
@pytest.mark.parametrize(("steps", "shape", "arguments"), [
    (1, (32, FEATURES), {}),
    (6, (8, FEATURES, 4, 3), {}),
    (6, (32, FEATURES), {"momentum": 0.99, "eps": 1e-2}),
    (3, (32, FEATURES), {"channelwise_affine": False}),
])  # fmt: skip
def test_ours_goes_on_where_equinox_is_and_back(lenient, steps, shape, arguments):
    eqx, fresh, empty = equinox_layer(**arguments)
    layer, state = train_equinox(eqx, fresh, empty, batches(steps, shape, axis=1))
    params, ours, settings = from_equinox(layer, state)
    for a, b in zip((ours.mean, ours.var), evaluated(layer, state), strict=True):
        assert_same(a, b)

    twin, copy = to_equinox(params, ours, settings, fresh, empty)
    jax.tree.map(assert_same, (twin.weight, twin.bias), (layer.weight, layer.bias))
    assert_same(copy.get(twin.batch_counter), state.get(layer.batch_counter))
    pairs = (copy.get(twin.batch_state_index), state.get(layer.batch_state_index))
    for a, b in zip(*pairs, strict=True):  # divided, and multiplied again: two roundings
        np.testing.assert_allclose(a, b, rtol=2**-22, atol=0)

    for each, memory in ((layer, state), (twin, copy)):
        now, mine = memory, ours
        for x in map(jnp.asarray, batches(2, shape, seed=5, axis=1)):
            y, _ = bn.batch_norm(x, params, mine, train=False, epsilon=each.eps, feature_axis=1)
            assert_close(y, apply(each, now, x, False)[0])
            y, mine = bn.batch_norm(x, params, mine, train=True, feature_axis=1, **settings)
            theirs, now = apply(each, now, x, True)
            assert_close(y, theirs)
            for a, b in zip((mine.mean, mine.var), evaluated(each, now), strict=True):
                assert_close(a, b)


@pytest.mark.peer
def test_a_layer_before_its_first_batch(lenient):
    _, layer, state = equinox_layer()
    params, ours, settings = from_equinox(layer, state)
    x = jnp.asarray(batches(1)[0])
    y, _ = bn.batch_norm(x, params, ours, train=False, epsilon=layer.eps)
    theirs, state = apply(layer, state, x, False)
    assert_close(y, theirs)
    before = evaluated(layer, state)
    twin, copy = to_equinox(params, ours, settings, layer, state)
    jax.tree.map(assert_same, evaluated(twin, copy), before)


@pytest.mark.peer
def test_the_defect_and_its_removal(lenient):
    """One batch of variance 4 at decay 0.99: equinox evaluates by 103."""
    eqx, layer, state = equinox_layer(momentum=0.99)
    x = jnp.asarray(np.random.default_rng(0).normal(0, 2, (4096, FEATURES)), jnp.float32)
    layer, state = train_equinox(eqx, layer, state, [x])
    true = np.asarray(x, np.float64).var(0)
    kept, removed = (
        from_equinox(layer, state, remove_initial_variance=remove)[1].var
        for remove in (False, True)
    )
    if np.abs(np.asarray(evaluated(layer, state)[1]) - true).max() < 1:
        pytest.skip("the installed equinox does not have this defect")
    np.testing.assert_allclose(kept, true + 99, rtol=1e-4)
    np.testing.assert_allclose(removed, true, rtol=1e-4)


@pytest.mark.peer
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_mode_ema_evaluates_the_same_and_back(lenient, steps):
    eqx, fresh, empty = equinox_layer("ema")
    layer, state = train_equinox(eqx, fresh, empty, batches(steps))
    params, ours, settings = from_equinox(layer, state)
    x = jnp.asarray(batches(1, seed=5)[0])
    if steps:
        y, _ = bn.batch_norm(x, params, ours, train=False, epsilon=layer.eps)
        assert_close(y, apply(layer, state, x, False)[0])
        twin, copy = to_equinox(params, ours, settings, fresh, empty)
        jax.tree.map(assert_same, evaluated(twin, copy), evaluated(layer, state))
    # The statistics go on alike, though equinox normalizes by them and ours by the batch.
    _, ours = bn.batch_norm(x, params, ours, train=True, **settings)
    _, state = apply(layer, state, x, True)
    for a, b in zip((ours.mean, ours.var), evaluated(layer, state), strict=True):
        assert_close(a, b)


@pytest.mark.peer
def test_a_layer_made_for_others_is_refused(lenient):
    _, layer, state = equinox_layer()
    params, ours = bn.init(FEATURES)
    settings = {"average": bn.DebiasedEma(0.9), "epsilon": 1e-3, "unbiased": True}
    with pytest.raises(ValueError, match=r"layer.eps: is 1e-05, but should be 0.001; make"):
        to_equinox(params, ours, settings, layer, state)
    settings["epsilon"] = 1e-5
    with pytest.raises(ValueError, match="input_size"):
        to_equinox(*bn.init(2), settings, layer, state)
    with pytest.raises(ValueError, match="is not in the given state"):
        from_equinox(layer, object())
