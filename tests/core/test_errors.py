"""Static mistakes raise our own errors, with the argument, its value and the remedy.

Shapes and dtypes in signatures are checked in these tests as well (``conftest.py``), and are wide
enough that it is not their error that surfaces.
"""

import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.core.batch_norm import check_train
from tests.devices import make_mesh

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
Z = jax.lax.complex(X, X)
PARAMS, STATE = bn.init(3)
COMPLEX = bn.init(3, dtype=jnp.complex64)
FOUR = jnp.ones(4)


def train(x=X, params=PARAMS, state=STATE, **options):
    return bn.batch_norm(x, params, state, **{"train": True} | options)


def evaluate(x=X, params=PARAMS, state=STATE, **options):
    return train(x, params, state, train=False, **options)


def traced_train():
    return jax.jit(lambda flag: train(train=flag))(True)


def where(value):
    return partial(train, where=value)


MISTAKES = {
    # train
    "traced train": (traced_train, TypeError, ["train is traced", "static_argnames='train'"]),
    "array train": (
        partial(train, train=jnp.array(True)),
        TypeError,
        ["train=Array(True", "must be True or False"],
    ),
    "number train": (partial(check_train, 1), TypeError, ["train=1", "must be True or False"]),
    "string train": (partial(check_train, "yes"), TypeError, ["train='yes'", "True or False"]),
    # x
    "int x": (
        partial(train, jnp.arange(6).reshape(2, 3)),
        TypeError,
        ["x has dtype int32", "x.astype(jnp.float32)"],
    ),
    "int x in evaluation": (
        partial(evaluate, np.arange(6).reshape(2, 3)),
        TypeError,
        ["x has dtype int32", "x.astype(jnp.float32)"],
    ),
    "bool x": (
        partial(train, jnp.ones((2, 3), bool)),
        TypeError,
        ["x has dtype bool", "x.astype(jnp.float32)"],
    ),
    "measure int x": (
        partial(bn.measure, jnp.arange(6).reshape(2, 3)),
        TypeError,
        ["x has dtype int32", "x.astype(jnp.float32)"],
    ),
    "one value": (
        partial(train, X[:1]),
        ValueError,
        ["x of shape (1, 3) has one", "larger batch", "axis_name", "train=False"],
    ),
    "one value in an image batch": (
        partial(train, jnp.ones((1, 3, 1, 1)), feature_axis=1),
        ValueError,
        ["x of shape (1, 3, 1, 1) has one", "train=False"],
    ),
    # features
    "scale": (
        partial(train, params=PARAMS._replace(scale=FOUR)),
        ValueError,
        ["scale has shape (4,)", "x of shape (8, 3)", "shape (3,)", "init((3,))"],
    ),
    "bias": (
        partial(train, params=PARAMS._replace(bias=FOUR)),
        ValueError,
        ["bias has shape (4,)", "shape (3,)", "set feature_axis, or init((3,))"],
    ),
    "mean": (
        partial(train, state=STATE._replace(mean=FOUR)),
        ValueError,
        ["mean has shape (4,)", "shape (3,)", "init((3,))"],
    ),
    "var": (
        partial(evaluate, state=STATE._replace(var=FOUR)),
        ValueError,
        ["var has shape (4,)", "shape (3,)", "init((3,))"],
    ),
    "count": (
        partial(train, state=STATE._replace(count=jnp.zeros((), jnp.int32))),
        ValueError,
        ["count has shape ()", "shape (3,)", "init((3,))"],
    ),
    "wrong axis": (
        partial(train, feature_axis=0),
        ValueError,
        ["scale has shape (3,)", "features of shape (8,) on axes (0,)", "set feature_axis"],
    ),
    "normalize mean": (
        partial(bn.normalize, X, FOUR, STATE.var, PARAMS),
        ValueError,
        ["mean has shape (4,)", "init((3,))"],
    ),
    "normalize var": (
        partial(bn.normalize, X, STATE.mean, FOUR, PARAMS),
        ValueError,
        ["var has shape (4,)", "init((3,))"],
    ),
    "normalize scale": (
        partial(bn.normalize, X, STATE.mean, STATE.var, PARAMS._replace(scale=FOUR)),
        ValueError,
        ["scale has shape (4,)", "init((3,))"],
    ),
    "advance": (
        partial(bn.advance, STATE, bn.measure(X[:, :2]), bn.Ema(0.9)),
        ValueError,
        ["state is of (3,)", "moments of (2,)", "feature_axis"],
    ),
    # axes
    "axis outside": (
        partial(train, feature_axis=2),
        ValueError,
        ["feature_axis=2", "axis 2", "(8, 3)", "from -2 to 1"],
    ),
    "axis outside below": (
        partial(train, feature_axis=(0, -3)),
        ValueError,
        ["feature_axis=(0, -3)", "axis -3", "from -2 to 1"],
    ),
    "axis twice": (
        partial(train, feature_axis=(1, -1)),
        ValueError,
        ["feature_axis=(1, -1)", "twice", "once"],
    ),
    "measure axis twice": (
        partial(bn.measure, X, feature_axis=[0, 0]),
        ValueError,
        ["feature_axis=[0, 0]", "twice"],
    ),
    "axis of a scalar": (
        partial(bn.measure, jnp.float32(1)),
        ValueError,
        ["feature_axis=-1", "shape ()"],
    ),
    "unbound axis_name": (
        partial(train, axis_name="devices"),
        NameError,
        ["axis_name='devices' is not bound", "jax.vmap(f, axis_name='devices')", "shard_map"],
    ),
    "one unbound of two": (
        lambda: jax.vmap(partial(train, axis_name=("i", "j")), axis_name="i")(X[None]),
        NameError,
        ["axis_name=('i', 'j') is not bound", "jax.vmap"],
    ),
    # where
    "where of words": (
        where(["yes"] * 8),
        TypeError,
        ["where has dtype <U3", "bool mask", "integers"],
    ),
    "negative count": (where([1, 1, 1, -2, 1, 1, 1, 1]), ValueError, ["the weight -2"]),
    "complex where": (
        where(jnp.ones(8, jnp.complex64)),
        TypeError,
        ["where has dtype complex64", "float weights"],
    ),
    "where of another length": (
        where(np.ones(7, bool)),
        ValueError,
        ["where has shape (7,)", "x (8, 3)", "(8,)", "axes of length 1"],
    ),
    "where of the features' length": (
        where(np.ones((1, 4), bool)),
        ValueError,
        ["where has shape (1, 4)", "x (8, 3)"],
    ),
    "where of too many axes": (
        where(np.ones((8, 3, 1), bool)),
        ValueError,
        ["where has shape (8, 3, 1)", "x (8, 3)"],
    ),
    "scalar where": (where(jnp.array(True)), ValueError, ["where has shape ()", "x (8, 3)"]),
    "where of one axis for an image": (
        partial(train, jnp.ones((8, 5, 5, 3)), where=np.ones(8, bool)),
        ValueError,
        ["where has shape (8,)", "(8, 5, 5, 3)", "(8, 5, 5)", "where[:, None, None]"],
    ),
    "negative weight": (
        where(np.array([1, 1, 1, -2, 1, 1, 1, 1], np.float32)),
        ValueError,
        ["where holds the weight -2.0", "cannot be negative"],
    ),
    "negative weight of jax": (
        where(jnp.array([1, 1, 1, -2, 1, 1, 1, 1], jnp.bfloat16)),
        ValueError,
        ["where holds the weight -2", "cannot be negative"],
    ),
    "NaN weight": (
        partial(bn.measure, X, where=np.full(8, np.nan)),
        ValueError,
        ["where holds the weight nan", "NaN"],
    ),
    # decay
    "decay above": (
        partial(bn.Ema, 1.01),
        ValueError,
        ["decay=1.01 is outside of [0, 1]", "torch", "1 - momentum"],
    ),
    "decay below": (partial(bn.DebiasedEma, -0.1), ValueError, ["decay=-0.1", "[0, 1]"]),
    "decay NaN": (partial(bn.DebiasedEma, float("nan")), ValueError, ["decay=nan", "[0, 1]"]),
    "decay of 99 percent": (partial(bn.Ema, 99), ValueError, ["decay=99", "0.99 keeps 99%"]),
    # epsilon
    "epsilon negative": (
        partial(train, epsilon=-1e-5),
        ValueError,
        ["epsilon=-1e-05", "not negative", "1e-5"],
    ),
    "epsilon NaN": (partial(train, epsilon=float("nan")), ValueError, ["epsilon=nan", "finite"]),
    "epsilon inf": (partial(evaluate, epsilon=np.inf), ValueError, ["epsilon=inf", "finite"]),
    "epsilon array": (
        partial(train, epsilon=jnp.ones(3)),
        ValueError,
        ["epsilon has shape (3,)", "one number", "1e-5"],
    ),
    "normalize epsilon": (
        partial(bn.normalize, X, STATE.mean, STATE.var, PARAMS, epsilon=jnp.float32(-1)),
        ValueError,
        ["epsilon=-1.0", "not negative"],
    ),
    "as_affine epsilon": (
        partial(bn.as_affine, PARAMS, STATE, epsilon=-1.0),
        ValueError,
        ["epsilon=-1.0", "not negative"],
    ),
    # complex and real
    "complex x, real state": (
        partial(train, Z),
        TypeError,
        ["mean has dtype float32 and x complex64", "init((3,), dtype=jnp.complex64)"],
    ),
    "real x, complex state": (
        partial(train, X, PARAMS, COMPLEX[1]),
        TypeError,
        ["mean has dtype complex64 and x float32", "init((3,), dtype=jnp.float32)"],
    ),
    "real x, complex params": (
        partial(evaluate, X, COMPLEX[0]),
        TypeError,
        ["scale has dtype complex64 and x float32", "init((3,), dtype=jnp.float32)"],
    ),
    "complex var": (
        partial(train, Z, COMPLEX[0], COMPLEX[1]._replace(var=COMPLEX[1].mean)),
        TypeError,
        ["var has dtype complex64", "their var real"],
    ),
    # init
    "negative features": (partial(bn.init, -3), ValueError, ["features=-3", "negative"]),
    "negative feature shape": (partial(bn.init, (2, -1)), ValueError, ["features=(2, -1)"]),
    "int parameters": (
        partial(bn.init, 3, dtype=jnp.int32),
        TypeError,
        ["dtype=int32", "jnp.float32"],
    ),
}


@pytest.mark.parametrize(("call", "kind", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_says_what_it_is_and_what_to_do(call, kind, parts):
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind  # ours, not the type checker's, which is another TypeError
    message = str(caught.value)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "call",
    [
        partial(train, train=np.True_),
        partial(train, epsilon=0),
        partial(train, epsilon=np.float32(1e-3)),
        partial(train, feature_axis=[-1]),
        partial(train, where=np.ones((1, 3), bool)),
        partial(train, where=np.ones((1, 1))),
        partial(train, X[:0]),
        partial(evaluate, X[:1]),
        partial(evaluate, X[:0]),
        partial(train, np.asarray(X, np.float64)),
        partial(train, Z, PARAMS, COMPLEX[1]),
        partial(train, params=bn.BatchNormParams(None, PARAMS.bias)),
        partial(train, params=bn.BatchNormParams(PARAMS.scale, None)),
        partial(bn.init, 0),
        partial(bn.init, ()),
        partial(bn.init, np.int64(3)),
        partial(bn.init, (np.int32(3), 2)),
        partial(bn.init, np.array([3, 2])),
        partial(train, feature_axis=np.int64(1)),
        partial(train, feature_axis=np.array([1])),
        partial(bn.measure, X, feature_axis=jnp.array(1)),
        partial(train, group_size=np.int64(4)),
        partial(train, where=[True] * 5 + [False] * 3),
        partial(evaluate, where=[0.5] * 8),
        partial(bn.measure, X, where=[[1]] * 8),
        partial(bn.Ema, 0),
        partial(bn.DebiasedEma, 1),
    ],
)
def test_what_is_no_mistake_is_accepted(call):
    call()


def test_traced_values_are_taken_as_they_are():
    """What is known only at run time cannot raise; such a weight or epsilon is the caller's."""
    run = jax.jit(lambda epsilon, where: train(epsilon=epsilon, where=where)[0])
    assert run(1e-5, jnp.ones(8)).shape == X.shape
    with pytest.raises(ValueError, match="epsilon has shape"):
        run(jnp.ones(3), jnp.ones(8))


def test_forgetting_axis_name_under_shard_map_is_caught_by_jax():
    """As the docstring of `batch_norm` says: the state of one shard is not that of all."""
    mesh = make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_of_it = jax.sharding.PartitionSpec("i"), jax.sharding.PartitionSpec()
    x = jnp.tile(X, (2, 1))
    forgetful = jax.shard_map(train, mesh=mesh, in_specs=rows, out_specs=(rows, all_of_it))
    with pytest.raises(ValueError, match="replicat"):
        jax.eval_shape(forgetful, x)


MISTAKES = """
import jax.numpy as jnp, bn_jax as bn
params, state = bn.init(3)
x = jnp.arange(12.0).reshape(4, 3)
calls = [
    lambda: bn.batch_norm(x, params, state, train=True, average=0.99),
    lambda: bn.batch_norm(x, state, params, train=True),
    lambda: bn.batch_norm(x, params._asdict(), state, train=True),
    lambda: bn.advance(bn.measure(x), state, bn.Ema(0.9)),
    lambda: bn.as_affine(state, params),
    lambda: bn.init(64.0),
    lambda: bn.measure(x, feature_axis=[0, 1.5]),
    lambda: bn.batch_norm(bn.batch_norm(x, params, state, train=True), params, state, train=True),
    lambda: bn.measure(state),
]
for call in calls:
    try:
        call()
    except TypeError as error:
        print(error)
params = bn.BatchNormParams([1, 1, 1], [0, 0, 0])
state = bn.BatchNormState([0] * 3, [1] * 3, [0] * 3)
for train in True, False:
    y, new = bn.batch_norm(x, params, state, train=train)
    expected, expected_new = bn.batch_norm(x, *bn.init(3), train=train)
    assert (y == expected).all()
    assert all((jnp.asarray(a) == b).all() for a, b in zip(new, expected_new))
assert new is state
assert (jnp.stack(bn.as_affine(params, state)) == jnp.stack(bn.as_affine(*bn.init(3)))).all()
moments = bn.Moments([1.0] * 3, [2.0] * 3, [4.0] * 3)
assert bn.advance(state, moments, bn.Ema(0.5)).mean.tolist() == [0.5] * 3
"""


def test_what_beartype_would_catch_first():
    """Mistakes, and lists, in a process of its own, where nothing checks the types of arguments."""
    run = subprocess.run([sys.executable, "-c", MISTAKES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    number, swapped, from_dict, moments, affine, features, axis, *pairs = run.stdout.splitlines()
    assert re.search(r"average=0.99 must be a function, .* DebiasedEma", number)
    assert re.search(r"params is a BatchNormState, but must be a BatchNormParams", swapped)
    assert re.search(r"params is a dict, .* BatchNormParams\(\*\*params\)", from_dict)
    assert re.search(r"state is a Moments, but must be a BatchNormState .* order", moments)
    assert re.search(r"params is a BatchNormState, but must be a BatchNormParams", affine)
    assert re.search(r"features=64.0 must be an integer", features)
    assert re.search(r"feature_axis=\[0, 1.5\] must be an integer or several", axis)
    assert len(pairs) == 2
    for message in pairs:
        assert re.search(r"^x is a tuple, .* batch_norm returns \(y, state\)", message)


def test_moments_of_other_features_are_not_merged():
    moments = [bn.measure(X[:, :features]) for features in (2, 1)]
    with pytest.raises(ValueError, match=r"a has features of shape \(2,\) and b of shape \(1,\)"):
        bn.merge(*moments)
