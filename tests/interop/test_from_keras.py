"""keras' weights: what they mean to us, and that keras agrees."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.interop.checks import CheckpointError
from bn_jax.interop.keras import by_name, from_keras, to_keras
from tests.interop.follow import FEATURES, assert_same, batches, follow, targets, vectors

WEIGHTS = dict(zip(("gamma", "beta", "moving_mean", "moving_variance"), vectors(), strict=True))


@pytest.mark.parametrize("absent", [(), ("gamma",), ("beta",), ("gamma", "beta")])
def test_a_round_trip_changes_nothing(absent):
    theirs = {key: value for key, value in WEIGHTS.items() if key not in absent}
    ours = from_keras(theirs, momentum=0.9, epsilon=2e-3)
    back, arguments = to_keras(*ours)
    assert list(back) == list(theirs)
    for key, value in back.items():
        assert_same(value, theirs[key])
    assert arguments == {
        "momentum": 0.9, "epsilon": 2e-3, "scale": "gamma" not in absent,
        "center": "beta" not in absent,
    }  # fmt: skip


@pytest.mark.parametrize("absent", [(), ("gamma",), ("beta",), ("gamma", "beta")])
def test_a_list_is_read_in_keras_order(absent):
    theirs = {key: value for key, value in WEIGHTS.items() if key not in absent}
    said = {"scale": "gamma" not in absent, "center": "beta" not in absent}
    by_name, listed = from_keras(theirs), from_keras(list(theirs.values()), **said)
    jax.tree.map(assert_same, by_name[:2], listed[:2])


@pytest.mark.parametrize("ending", ["", ":0"])
def test_names_of_a_whole_model(ending):
    theirs = {f"net/bn/{key}{ending}": value for key, value in WEIGHTS.items()}
    theirs |= {"net/bn_1/gamma": WEIGHTS["beta"], "net/dense/kernel": np.ones((2, 2))}
    assert_same(from_keras(theirs, "net/bn")[0].scale, WEIGHTS["gamma"])


FILES = {
    "keras 2, .h5": lambda layer, key, n: f"model_weights/{layer}/{layer}/{key}:0",
    "keras 3, .h5": lambda layer, key, n: f"model_weights/{layer}/net/{layer}/{key}",
    "keras 3, .weights.h5": lambda layer, key, n: f"layers/{layer}/vars/{n}",
}


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("nest", [False, True])
def test_names_of_a_file(form, nest):
    """As they stand in the file, flat or nested as h5py opens it."""
    theirs = {}
    for layer, values in (("bn", WEIGHTS), ("bn_1", dict.fromkeys(WEIGHTS, np.ones(FEATURES)))):
        for n, (key, value) in enumerate(values.items()):
            theirs[FILES[form](layer, key, n)] = value
    theirs[FILES[form]("dense", "kernel", 0)] = np.ones((2, 2))
    if nest:
        tree = {}
        for names, value in theirs.items():
            *path, last = names.split("/")
            branch = tree
            for name in path:
                branch = branch.setdefault(name, {})
            branch[last] = value
        theirs = tree
    params, state, _ = from_keras(theirs, "bn")
    ours = (*params, state.mean, state.var)
    for value, key in zip(ours, WEIGHTS, strict=True):
        assert_same(value, WEIGHTS[key])
    with pytest.raises(CheckpointError, match=r"prefix '': fits the weights of '.*/bn.*/bn_1"):
        from_keras(theirs)
    with pytest.raises(CheckpointError, match=r"prefix 'b': fits none of .*/bn"):
        from_keras(theirs, "b")


def test_more_names_tell_layers_of_one_name_apart():
    theirs = {f"{net}/bn/{key}": v for net in ("a", "b") for key, v in WEIGHTS.items()}
    theirs["a/bn/gamma"] = WEIGHTS["beta"]
    assert_same(from_keras(theirs, "a/bn")[0].scale, WEIGHTS["beta"])
    assert_same(from_keras(theirs, "/b/bn/")[0].scale, WEIGHTS["gamma"])
    with pytest.raises(CheckpointError, match="fits the weights of 'a/bn', 'b/bn'; give one"):
        from_keras(theirs, "bn")


def test_ten_numbered_weights_are_in_order():
    assert list(by_name({f"bn/vars/{n}": n for n in (10, 2, 0)}, "bn").values()) == [0, 2, 10]


def test_the_core_convention_needs_m():
    params, state, settings = from_keras(WEIGHTS, values_per_feature=16)
    assert settings["unbiased"]
    np.testing.assert_allclose(state.var, WEIGHTS["moving_variance"] * 16 / 15, rtol=1e-6)
    back, _ = to_keras(params, state, settings, values_per_feature=16)
    np.testing.assert_allclose(back["moving_variance"], WEIGHTS["moving_variance"], rtol=1e-6)


def keras_layer(shape, **arguments):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("keras was set up with another backend than jax")
    layer = keras.layers.BatchNormalization(**arguments)
    layer.build(shape)
    return layer


def train_keras(layer, xs):
    """Some steps of gradient descent."""

    def loss(trainable, rest, x, target):
        y, rest = layer.stateless_call(trainable, rest, x, training=True)
        return jnp.mean((y - target) ** 2), rest

    trainable = [variable.value for variable in layer.trainable_variables]
    rest = [variable.value for variable in layer.non_trainable_variables]
    for x, target in zip(xs, targets(xs), strict=True):
        gradients, rest = jax.grad(loss, has_aux=True)(trainable, rest, x, target)
        trainable = [p - 0.1 * g for p, g in zip(trainable, gradients, strict=True)]
    variables = (*layer.trainable_variables, *layer.non_trainable_variables)
    for variable, value in zip(variables, (*trainable, *rest), strict=True):
        variable.assign(value)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # keras' own
@pytest.mark.parametrize("arguments", [
    {}, {"momentum": 0.5, "epsilon": 1e-2, "axis": 1}, {"scale": False}, {"center": False},
    {"scale": False, "center": False},
])  # fmt: skip
def test_ours_goes_on_where_keras_is_and_back(lenient, arguments):
    axis = arguments.get("axis", -1)
    shape = (8, FEATURES, 3, 4) if axis == 1 else (32, FEATURES)
    layer = keras_layer(shape, **arguments)
    train_keras(layer, batches(4, shape, axis=axis))
    words = {key: value for key, value in arguments.items() if key != "axis"}
    converted = from_keras(layer.get_weights(), **words)

    back, made = to_keras(*converted)
    twin = keras_layer(shape, axis=axis, **made)
    twin.set_weights(list(back.values()))
    for a, b in zip(twin.get_weights(), layer.get_weights(), strict=True):
        assert_same(a, b)

    for each in (layer, twin):
        follow(
            converted, lambda x, each=each: each(x, training=False),
            lambda x, each=each: each(x, training=True),
            batches(2, shape, seed=5, axis=axis), axis=axis,
            read=lambda each=each: (each.moving_mean.value, each.moving_variance.value),
        )  # fmt: skip


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # keras' own
@pytest.mark.parametrize(("name", "prefix"), [("m.h5", "bn"), ("m.weights.h5", "")])
def test_keras_own_files_are_read(lenient, tmp_path, name, prefix):
    h5py = pytest.importorskip("h5py")
    layer = keras_layer((32, FEATURES), name="bn", scale=False)
    train_keras(layer, batches(2))
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((FEATURES,)), layer])
    (model.save_weights if "weights" in name else model.save)(tmp_path / name)
    with h5py.File(tmp_path / name) as file:
        params, state, _ = from_keras(file, prefix, scale=False)
    assert_same(state.var, layer.moving_variance.value)
    assert params.scale is None
    assert_same(params.bias, layer.beta.value)


@pytest.mark.peer
def test_keras_own_names_are_read(lenient):
    layer = keras_layer((32, FEATURES), name="bn")
    by_path = {variable.path: variable for variable in layer.variables}
    params, _, settings = from_keras(by_path, "bn", momentum=layer.momentum)
    assert_same(params.scale, layer.gamma.value)
    assert settings["epsilon"] == layer.epsilon == 1e-3
    assert settings["average"] == bn.Ema(0.99)
