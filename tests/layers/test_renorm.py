"""Batch Renormalization in the layers: that of the core, with their variables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax as bn
import bn_jax.layers.linen
import bn_jax.layers.nnx
from tests.layers.draws import normal

close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
LIMITS = {
    "numbers": (1.5, 0.5),
    "schedules": (
        lambda count: 1 + 0.1 * jnp.float32(count),
        lambda count: 0.2 * jnp.float32(count),
    ),
}
AVERAGE = bn.DebiasedEma(0.9)


def in_core(xs, limits, group_size):
    (params, state), ys = bn.init(3), []
    for x in xs:
        y, state = bn.batch_renorm(
            x, params, state, train=True, r_max=limits[0], d_max=limits[1], average=AVERAGE,
            group_size=group_size,
        )  # fmt: skip
        ys.append(y)
    return ys, state


def in_linen(xs, limits, **options):
    layer, ys = bn_jax.layers.linen.BatchNorm(average=AVERAGE, renorm=limits, **options), []
    variables = layer.init(jax.random.key(0), xs[0], use_running_average=True)
    for x in xs:
        y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables, ys = variables | updates, [*ys, y]
    stats = variables["batch_stats"]
    evaluated = layer.apply(variables, xs[0], use_running_average=True)
    return ys, bn.BatchNormState(stats["mean"], stats["var"], stats["count"]), evaluated


def in_nnx(xs, limits, **options):
    options |= {"average": AVERAGE, "renorm": limits}
    layer = bn_jax.layers.nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0))
    ys = [layer(x) for x in xs]
    layer.eval()
    state = bn.BatchNormState(layer.mean[...], layer.var[...], layer.count[...])
    return ys, state, layer(xs[0])


def in_equinox(xs, limits, **options):
    eqx = pytest.importorskip("equinox")
    from bn_jax.layers.equinox import BatchNorm

    layer, state = eqx.nn.make_with_state(BatchNorm)(
        3, axis=-1, momentum=0.9, renorm=limits, **options
    )
    ys = []
    for x in xs:
        y, state = layer(x, state)
        ys.append(y)
    remembered = state.get(layer.state_index)
    return ys, remembered, layer(xs[0], state, inference=True)[0]


@pytest.mark.parametrize("shell", [in_linen, in_nnx, in_equinox])
@pytest.mark.parametrize(("limits", "group_size"), [("numbers", None), ("schedules", 4)])
def test_that_of_the_core(shell, limits, group_size):
    xs = [normal((8, 3), 2 * n, 1 + n, seed=n) for n in range(3)]
    ys, state = in_core(xs, LIMITS[limits], group_size)
    found, remembered, evaluated = shell(xs, LIMITS[limits], group_size=group_size)
    jax.tree.map(close, found, ys)
    close(remembered.mean, state.mean)
    close(remembered.var, state.var)
    close(remembered.count, state.count)
    close(evaluated, bn.batch_norm(xs[0], *bn.init(3)[:1], state, train=False)[0])
    assert not np.allclose(ys[2], bn.batch_norm(xs[2], *bn.init(3), train=True)[0], atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renorm": (3.0, 5.0), "unbiased": True}, "unbiased=True"),
        ({"renorm": 3.0}, r"must be a pair \(r_max, d_max\)"),
    ],
)
def test_mistakes_are_named(options, message):
    layer = bn_jax.layers.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=message):
        layer(normal((8, 3)))
