"""Each library's defaults in the core's words, from a new layer on: the "Coming from" table."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from tests.interop.follow import FEATURES, assert_close, batches

WORDS = {
    "flax": {"average": bn.Ema(0.99), "unbiased": False},
    "torch": {"average": bn.Ema(0.9)},
    "keras": {"average": bn.Ema(0.99), "unbiased": False, "epsilon": 1e-3},
    "haiku": {"average": bn.DebiasedEma(0.99), "unbiased": False},
    "equinox": {"average": bn.DebiasedEma(0.99), "unbiased": False},
}


def flax_steps(xs):
    import flax.linen as nn

    layer = nn.BatchNorm()
    variables = layer.init(jax.random.key(0), xs[0], use_running_average=False)
    for x in xs:
        y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = variables | new
        yield y, new["batch_stats"]["mean"], new["batch_stats"]["var"]


def torch_steps(xs):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(FEATURES)
    for x in xs:
        y = layer(torch.from_numpy(x)).detach().numpy()
        yield y, layer.running_mean.numpy(), layer.running_var.numpy()


def keras_steps(xs):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    layers = pytest.importorskip("keras.layers")
    layer = layers.BatchNormalization()
    for x in xs:
        yield layer(x, training=True), layer.moving_mean.value, layer.moving_variance.value
    # Frozen, keras evaluates even where it is told to train: our train=False.
    layer.trainable = False
    np.testing.assert_array_equal(layer(xs[0], training=True), layer(xs[0], training=False))


def haiku_steps(xs):
    hk = pytest.importorskip("haiku")

    def forward(x, train, local=False):
        return hk.BatchNorm(True, True, decay_rate=0.99)(x, train, test_local_stats=local)

    layer = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = layer.init(None, xs[0], True)
    for x in xs:
        # test_local_stats is our train=True with the new state thrown away.
        local, kept = layer.apply(params, state, x, False, True)
        jax.tree.map(np.testing.assert_array_equal, kept, state)
        y, state = layer.apply(params, state, x, True)
        np.testing.assert_array_equal(local, y)
        mean, var = (state[f"batch_norm/~/{key}_ema"]["average"][0] for key in ("mean", "var"))
        yield y, mean, var


def equinox_steps(xs):
    eqx = pytest.importorskip("equinox")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        FEATURES, axis_name="batch", mode="batch"
    )
    step = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for count, x in enumerate(xs, 1):
        y, state = step(x, state)
        scale = 1 - layer.momentum**count
        mean, var = (hidden / scale for hidden in state.get(layer.batch_state_index))
        yield y, mean, var - layer.momentum**count / scale  # the initial variance it leaves in


STEPS = {
    "flax": flax_steps, "torch": torch_steps, "keras": keras_steps, "haiku": haiku_steps,
    "equinox": equinox_steps,
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("library", STEPS)
def test_the_defaults_in_our_words(lenient, library):
    params, state = bn.init(FEATURES)
    xs = batches(3)
    # haiku and equinox debias by 1 - decayᵗ in float32, which at 0.99 is good to eps / 0.01.
    bar = 1e-5 if library in ("flax", "torch", "keras") else 2e-5
    for x, (y, mean, var) in zip(xs, STEPS[library](xs), strict=True):
        ours, state = bn.batch_norm(jnp.asarray(x), params, state, train=True, **WORDS[library])
        assert_close(ours, y)
        assert_close(state.mean, mean, bar)
        # equinox' is the difference of two numbers near 1/(1 - decayᵗ) = 100: good to 100 eps.
        assert_close(state.var, var, bar)


def test_one_call_on_a_batch_is_examples_under_vmap():
    """equinox' way of calling a layer, per example and by axis_name, gives the same here."""
    params, state = bn.init(FEATURES)
    x = jnp.asarray(batches(1)[0])

    def example(x):
        return bn.batch_norm(x, params, state, train=True, axis_name="batch")

    y, one = jax.vmap(example, axis_name="batch", out_axes=(0, None))(x)
    whole, state = bn.batch_norm(x, params, state, train=True)
    assert_close(y, whole)
    assert_close(one.var, state.var)
