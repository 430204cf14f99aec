"""The Equinox layer: the functional core, however it is called."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from tests.layers.draws import normal
from tests.test_imports import HEAVY, loaded_in_vain

eqx = pytest.importorskip("equinox")

from bn_jax.interop.equinox import from_equinox  # noqa: E402
from bn_jax.layers.equinox import BatchNorm  # noqa: E402

make = eqx.nn.make_with_state
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
X = normal((8, 3, 2, 2), 5, 2)  # batch, channels, height, width


def over(layer, name="batch", **options):
    """The layer on a batch of examples, as Equinox calls its own."""
    call = functools.partial(layer, **options)
    return jax.vmap(call, axis_name=name, in_axes=(0, None), out_axes=(0, None))


def stored(layer, state):
    return state.get(layer.state_index)


@pytest.fixture
def core():
    """y and the state of the functional core for X."""
    return bn.batch_norm(X, *bn.init(3), train=True, feature_axis=1)


def assert_like_core(y, layer, state, core):
    close(y, core[0])
    jax.tree.map(close, stored(layer, state), core[1])


def test_under_vmap(core):
    layer, state = make(BatchNorm)(3, "batch")
    y, state = over(layer)(X, state)
    assert_like_core(y, layer, state, core)


def test_without_vmap(core):
    layer, state = make(BatchNorm)(3, axis=1)
    y, state = layer(X, state)
    assert_like_core(y, layer, state, core)


def test_one_layer_both_ways(core):
    """With an axis from the end, a batch and its examples have the features in one place."""
    layer, state = make(BatchNorm)(3, axis=-3)
    y, state = layer(X, state)
    assert_like_core(y, layer, state, core)
    y, _ = layer(X, state, inference=True)
    for_each, _ = over(layer, inference=True)(X, state)
    close(for_each, y)


def test_nested_vmap(core):
    """Two named axes are one batch; an axis that is not named keeps batches apart."""
    layer, state = make(BatchNorm)(3, ["outer", "inner"])
    members = X.reshape(2, 4, 3, 2, 2)
    y, state = over(over(layer, "inner"), "outer")(members, state)
    assert_like_core(y.reshape(X.shape), layer, state, core)

    layer, state = make(BatchNorm)(3, "inner")
    y, states = jax.vmap(over(layer, "inner"), in_axes=(0, None))(members, state)
    for n in range(2):
        one, alone = bn.batch_norm(members[n], *bn.init(3), train=True, feature_axis=1)
        close(y[n], one)
        close(stored(layer, states).mean[n], alone.mean)


def test_right_from_the_first_batch():
    """Where Equinox' own mode="batch" leaves 103 of a true variance of 4 (decay 0.99)."""
    layer, state = make(BatchNorm)(3, axis=1)
    x = normal((4096, 3), 1, 2)
    _, state = layer(x, state)
    close(stored(layer, state).var, np.float64(x).var(0, ddof=1), rtol=1e-5)
    y, _ = eqx.nn.inference_mode(layer)(x, state)
    close(np.std(y, 0), [1.0] * 3, rtol=1e-3)


def test_inference_leaves_the_state_in_use():
    layer, state = make(BatchNorm)(3, axis=1)
    layer = eqx.nn.inference_mode(layer)
    y, same = layer(X, state)
    again, _ = layer(X, state)  # a state that was set would be used up
    close(again, y)
    jax.tree.map(np.testing.assert_array_equal, stored(layer, same), bn.init(3)[1])
    trained, _ = layer(X, state, inference=False)
    close(trained.mean((0, 2, 3)), [0.0] * 3, atol=1e-5)


def test_trees_hold_arrays_and_a_flag_only():
    """An axis name that is a leaf is refused by jax.device_put and jax.jit."""
    layer, _ = make(BatchNorm)(3, "batch")
    assert [type(leaf) for leaf in jax.tree.leaves(layer) if not eqx.is_array(leaf)] == [bool]
    assert jax.tree.structure(layer) == jax.tree.structure(make(BatchNorm)(3, "batch")[0])


def test_in_a_sequential_under_jit_and_grad():
    def build(key):
        first, last = jax.random.split(key)
        return eqx.nn.Sequential(
            [
                eqx.nn.Linear(4, 5, key=first),
                BatchNorm(5, "batch", momentum=0.9),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Linear(5, 1, key=last),
            ]
        )

    model, state = make(build)(jax.random.key(0))
    x = normal((16, 4), 3)
    traced = []

    def loss(model, state, x):
        traced.append(x)
        y, state = over(model)(x, state)
        return jnp.mean((y[:, 0] - x.sum(1)) ** 2), state

    @eqx.filter_jit
    def step(model, state, x):
        (value, state), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(model, state, x)
        moved = eqx.apply_updates(model, jax.tree.map(lambda g: -0.01 * g, gradients))
        return moved, state, value

    values = []
    for _ in range(10):
        model, state, value = step(model, state, x)
        values.append(value)
    assert values[-1] < values[0]
    assert len(traced) == 1
    layer = model.layers[1]
    assert stored(layer, state).count.tolist() == [10] * 5
    assert (layer.weight != 1).all()


def test_masks_and_what_the_core_can_do():
    layer, state = make(BatchNorm)(
        3, axis=-1, unbiased=False, average=bn.CumulativeAverage(), group_size=4,
        channelwise_affine=False, eps=0.1,
    )  # fmt: skip
    x = X[..., 0, 0]
    mask = np.arange(8) < 6
    y, state = layer(x, state, mask=mask)
    params = bn.BatchNormParams(None, None)
    expected, expected_state = bn.batch_norm(
        x, params, bn.init(3)[1], train=True, unbiased=False, average=bn.CumulativeAverage(),
        group_size=4, epsilon=0.1, where=mask,
    )  # fmt: skip
    close(y, expected)
    jax.tree.map(close, stored(layer, state), expected_state)
    assert layer.weight is None


def test_saved_and_loaded(tmp_path, core):
    layer, state = make(BatchNorm)(3, axis=1)
    _, state = layer(X, state)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", (layer, state))
    like = make(BatchNorm)(3, axis=1)
    layer, state = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like)
    jax.tree.map(close, stored(layer, state), core[1])


def test_values_of_equinox_own(lenient):
    """By the converter, as .docs/coming-from.md shows."""
    theirs, their_state = make(eqx.nn.BatchNorm)(3, "batch", mode="batch", momentum=0.9)
    _, their_state = over(theirs)(X, their_state)
    params, values, settings = from_equinox(theirs, their_state)
    layer, state = make(BatchNorm)(3, "batch", average=settings["average"], unbiased=False)
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, tuple(params))
    state = state.set(layer.state_index, values)
    for inference in (True, False):
        y, _ = over(theirs, inference=inference)(X, their_state)
        close(over(layer, inference=inference)(X, state)[0], y, atol=1e-5)


def test_the_page_about_it_runs(lenient):
    """Its blocks are marked `py`, which the tests of the other pages leave alone."""
    page = Path(__file__).parents[2] / ".docs" / "equinox.md"
    blocks = re.findall(r"^```py\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert len(blocks) == 3


@pytest.mark.slow
def test_the_layer_loads_no_other_framework():
    assert not loaded_in_vain("import bn_jax.layers.equinox", HEAVY)


def test_mistakes_are_named():
    layer, state = make(BatchNorm)(3, "batch")
    with pytest.raises(NameError, match="batch"):
        layer(X[0], state)
    layer, state = make(BatchNorm)(3)
    with pytest.raises(ValueError, match="more than one value per feature"):
        layer(X[0, :, 0, 0], state)
