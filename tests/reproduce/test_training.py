"""Many runs in one program do what each would do alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.reproduce.network import Classifier, plain
from bn_jax.reproduce.training import Data, Run, begin, one_by_one, shuffled, train

IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (40, 784)), jnp.uint8)
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, 10, 40), jnp.int32)
DATA = Data(IMAGES, LABELS, IMAGES, LABELS)
NETWORK = Classifier(bn.batch_norm, hidden=(6, 5))
RATES = (0.1, 0.3)


def runs(network=NETWORK, seeds=2):
    return begin(network.make, seeds, init_std=0.1, learning_rate=RATES)


def look(run, data):
    return {"kernel": run.params.kernels[0], "count": run.states[0].count}


@functools.cache
def trained(together=jax.vmap):
    options = {"rows": shuffled(8, 40), "every": 3, "steps": 6, "measure": look}
    return train(runs(), NETWORK.loss, DATA, together=together, **options)


def by_hand(seed, rate, steps=6):
    """The same steps, one after the other."""
    init_key, key = jax.random.split(jax.random.key(seed))
    params, states = NETWORK.make(init_key, {"init_std": jnp.float32(0.1)})

    @jax.jit
    def step(params, states, step):
        rows = shuffled(8, 40)(key, step, 1)[0]
        run = Run(params, states, key, step, {})
        gradient = jax.grad(
            lambda p: NETWORK.loss(p, run, IMAGES[rows], LABELS[rows]), has_aux=True
        )
        grads, states = gradient(params)
        return jax.tree.map(lambda p, g: p - jnp.float32(rate) * g, params, grads), states

    for number in range(steps):
        params, states = step(params, states, jnp.int32(number))
    return params, states


def test_each_run_is_that_of_its_seed_and_rate():
    done, _ = trained()
    for i, rate, seed in ((0, RATES[0], 0), (3, RATES[1], 1)):
        alone = jax.tree.leaves(by_hand(seed, rate))
        for a, b in zip(jax.tree.leaves((done.params, done.states)), alone, strict=True):
            # Float32 rounding of six steps, in another order.
            np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-6)


def test_one_by_one_is_together():
    together, alone = trained()[0], trained(one_by_one)[0]
    for a, b in zip(jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_what_is_measured_comes_before_the_first_step_and_after_every_few():
    done, series = trained()
    assert series["step"].tolist() == [0, 3, 6]
    assert series["count"].shape == (3, 4, 6)
    assert series["count"][:, 0, 0].tolist() == [0, 3, 6]
    np.testing.assert_array_equal(series["kernel"][0], runs().params.kernels[0])
    np.testing.assert_array_equal(series["kernel"][-1], done.params.kernels[0])
    assert (series["train_loss"][1:] > 0).all()


def test_a_seed_is_the_same_with_and_without_batch_norm():
    """So that the two can be compared pairwise: weights and batches."""
    ours, without = runs(), runs(Classifier(plain, hidden=(6, 5)))
    for a, b in zip(ours.params.kernels, without.params.kernels, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (ours.key == without.key).all()
    assert without.params.affine[0].scale is None


def test_runs_are_all_combinations_with_seeds_innermost():
    some = begin(NETWORK.make, 2, init_std=(0.1, 0.2, 0.4), learning_rate=RATES)
    found = zip(
        *(some.values[name].tolist() for name in ("init_std", "learning_rate")), strict=True
    )
    wanted = [(std, rate) for std in (0.1, 0.2, 0.4) for rate in RATES for _ in range(2)]
    np.testing.assert_allclose(list(found), wanted, rtol=1e-6)
    spread = some.params.kernels[0].std((1, 2))
    np.testing.assert_allclose(spread, [std for std, _ in wanted], rtol=0.1)  # of 4,704 numbers
    assert (some.key == begin(NETWORK.make, 2, learning_rate=0.1).key[jnp.array([0, 1] * 6)]).all()


def test_measurements_come_at_whole_intervals():
    options = {"rows": shuffled(8, 40), "measure": look}
    with pytest.raises(ValueError, match="every=4 must divide steps=6"):
        train(runs(), NETWORK.loss, DATA, every=4, steps=6, **options)
