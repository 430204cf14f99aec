"""The shells equal flax's own with use_fast_variance=False, argument by argument.

Outputs and statistics are compared with flax's directly. Gradients are compared with those that
flax computes in float32 from the same numbers, since flax's bfloat16 gradients sum several rounded
parts; so are the outputs of nnx at evaluation in bfloat16, which flax gets wrong. Two of three
cases run with `-m slow`.
"""

import inspect
import itertools
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers

import bn_jax.layers.linen
import bn_jax.layers.nnx

HALF, SINGLE = jnp.bfloat16, jnp.float32
SHAPE = (6, 4, 5)
EPSILON = 1e-3
RANDOM = {"scale_init": initializers.normal(1.0), "bias_init": initializers.normal(1.0)}
NNX_PROMOTES = "promote_dtype" in inspect.signature(nnx.BatchNorm.__init__).parameters


class Case(NamedTuple):
    axis: Any
    masked: bool
    dtype: Any
    x_dtype: Any
    param_dtype: Any
    use_scale: bool
    use_bias: bool
    momentum: float

    @property
    def settings(self):
        fields = ("axis", "dtype", "param_dtype", "use_scale", "use_bias", "momentum")
        return {name: getattr(self, name) for name in fields} | {"epsilon": EPSILON} | RANDOM

    @property
    def features(self):
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return tuple(SHAPE[axis] for axis in axes)

    @property
    def mask(self):
        return jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None, None] if self.masked else None

    def __str__(self):
        return "-".join(getattr(value, "__name__", str(value)) for value in self)


# The product of the first five; scale and bias on and off, and the momentum, take turns in it.
FLAGS = [(True, True), (True, False), (False, True), (False, False), (True, True)]
CASES = [
    Case(*case, *FLAGS[i % 5], (0.99, 0.9, 0.0, 1.0)[i % 4])
    for i, case in enumerate(
        itertools.product(
            (-1, 1, (1, -1)), (False, True), (None, SINGLE, HALF), (SINGLE, HALF), (SINGLE, HALF)
        )
    )
]


class Linen:
    """Either shell as a function of params, statistics and x."""

    ours, theirs = bn_jax.layers.linen.BatchNorm, flax.linen.BatchNorm

    @staticmethod
    def init(layer, settings, features, x):
        variables = layer(**settings).init(jax.random.key(1), x, False)
        return variables.get("params", {}), variables["batch_stats"]

    @staticmethod
    def apply(layer, settings, params, stats, x, train, mask):
        variables = {"params": params, "batch_stats": stats}
        y, updates = layer(**settings).apply(
            variables, x, not train, mask=mask, mutable=["batch_stats"]
        )
        return y, updates["batch_stats"]

    @staticmethod
    def seen(dtype, value):
        """A value as the layer takes it in."""
        return value


class Nnx:
    ours, theirs = bn_jax.layers.nnx.BatchNorm, nnx.BatchNorm

    @staticmethod
    def make(layer, settings, features):
        features = features[0] if len(features) == 1 else features
        return layer(features, rngs=nnx.Rngs(1), **settings)

    @staticmethod
    def init(layer, settings, features, x):
        made = Nnx.make(layer, settings, features)
        return (nnx.to_pure_dict(nnx.state(made, kind)) for kind in (nnx.Param, nnx.BatchStat))

    @staticmethod
    def apply(layer, settings, params, stats, x, train, mask):
        made = Nnx.make(layer, settings, stats["mean"].shape)
        nnx.update(made, params | stats)
        y = made(x, not train, mask=mask)
        return y, nnx.to_pure_dict(nnx.state(made, nnx.BatchStat))

    @staticmethod
    def seen(dtype, value):
        return value.astype(dtype)


# flax.nnx has one feature axis only; test_nnx.py compares several with linen.
PAIRS = [(shell, case) for shell in (Linen, Nnx) for case in CASES]
PAIRS = [(shell, case) for shell, case in PAIRS if shell is Linen or len(case.features) == 1]


def is_quick(i):
    """A third of the dozen types of each axis and mask, another third for the next."""
    return (i + i // 12) % 3 == 0


@pytest.mark.parametrize(
    ("shell", "case"),
    [
        pytest.param(
            *pair, id=f"{pair[0].__name__}-{pair[1]}", marks=[] if is_quick(i) else pytest.mark.slow
        )
        for i, pair in enumerate(PAIRS)
    ],
)
def test_equals_flax(shell, case, flax_rules, close, same_tree):
    settings, mask = case.settings, case.mask
    x_key, cotangent_key = jax.random.split(jax.random.key(0))
    x = (3 + 2 * jax.random.normal(x_key, SHAPE)).astype(case.x_dtype)
    # Of bfloat16's numbers, so that going backward through a cast does not round it.
    cotangent = jax.random.normal(cotangent_key, SHAPE, HALF).astype(SINGLE)

    with flax_rules():
        params, stats = shell.init(shell.theirs, settings, case.features, x)
    our_params, our_stats = shell.init(shell.ours, settings, case.features, x)
    for ours, theirs in [(our_params, params), (our_stats, stats)]:
        same_tree(ours, theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    stats = {"mean": stats["mean"] + 0.5, "var": stats["var"] * 2}  # not the initial ones
    accurate = settings | {"use_fast_variance": False}

    def loss(layer, settings, params, x):
        y, new = shell.apply(layer, settings, params, stats, x, True, mask)
        return jnp.sum(y.astype(SINGLE) * cotangent), (y, new)

    grads, (y, new) = jax.grad(loss, (2, 3), has_aux=True)(shell.ours, settings, params, x)
    y_eval, kept = shell.apply(shell.ours, settings, params, stats, x, False, mask)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)

    with flax_rules():
        y_theirs, new_theirs = shell.apply(shell.theirs, accurate, params, stats, x, True, mask)
        y_eval_theirs = shell.apply(shell.theirs, accurate, params, stats, x, False, mask)[0]
    if shell is Nnx and not NNX_PROMOTES and y.dtype != y_theirs.dtype:
        pytest.skip("this flax.nnx does not promote x, mean and var, as later ones do")
    result = y_theirs.dtype
    assert y.dtype == y_eval.dtype == result

    # The same numbers in float32.
    exact = accurate | {"dtype": SINGLE, "param_dtype": SINGLE}
    wide_params, wide_x = jax.tree.map(lambda a: shell.seen(result, a).astype(SINGLE), (params, x))
    with flax_rules():
        grads_theirs, (y_wide, new_wide) = jax.grad(loss, (2, 3), has_aux=True)(
            shell.theirs, exact, wide_params, wide_x
        )
        y_eval_wide = shell.apply(shell.theirs, exact, wide_params, stats, wide_x, False, mask)[0]
    if shell is Nnx and result == HALF:
        y_eval_theirs = y_eval_wide
        if not NNX_PROMOTES:
            y_theirs, new_theirs = y_wide, new_wide

    # What roundings are relative to: x is rounded before its mean is taken off.
    largest, weight = float(jnp.abs(wide_x).max()), float(jnp.abs(cotangent).sum())
    counted = np.asarray(wide_x if mask is None else wide_x[mask[:, 0, 0]])
    batch = tuple(i for i in range(3) if i not in np.atleast_1d(case.axis) % 3)
    rstd = float(counted.var(batch).min() + EPSILON) ** -0.5
    slope = rstd * max(1.0, float(jnp.abs(wide_params.get("scale", jnp.ones(()))).max()))
    offset = float(jnp.abs(wide_params.get("bias", jnp.zeros(()))).max())
    close(y, y_theirs, result, size=slope * largest + offset)
    close(y_eval, y_eval_theirs, result, size=slope * largest + offset)
    close(new["mean"], new_theirs["mean"], size=largest)
    close(new["var"], new_theirs["var"])
    rounded = (result, case.param_dtype) if shell is Nnx else (case.param_dtype,)
    same_tree(grads[0], params)
    if case.use_scale:
        size = weight * largest * rstd
        close(grads[0]["scale"], grads_theirs[0]["scale"], *rounded, size=size)
    if case.use_bias:
        close(grads[0]["bias"], grads_theirs[0]["bias"], *rounded, size=weight)
    rounded = (result, case.x_dtype) if shell is Nnx else (case.x_dtype,)
    size = slope * float(jnp.abs(cotangent).max()) * (1 + (largest * rstd) ** 2)
    close(grads[1], grads_theirs[1], *rounded, size=size)
