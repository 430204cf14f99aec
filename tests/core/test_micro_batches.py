"""Gradient accumulation by optax.MultiSteps: the state moves once per update, by merged moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bn_jax as bn

AVERAGE, PARTS, SIZE = bn.DebiasedEma(0.9), 4, 6


@pytest.fixture
def examples():
    random = np.random.default_rng(0)
    x = random.normal(50, 3, (2, PARTS, SIZE, 5)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(random.normal(size=(2, PARTS, SIZE, 3)), jnp.float32)


def test_the_recipe(examples, lenient):
    """Against the state of whole batches, and gradients of ghost batch norm, in numpy's float64."""
    kernel = jax.random.normal(jax.random.key(0), (5, 3))
    params, state = bn.init(3)
    multi = optax.MultiSteps(optax.sgd(0.0), PARTS)
    opt_state = multi.init((kernel, params))

    def loss_fn(learned, x, target):
        z = x @ learned[0]
        y, _ = bn.batch_norm(z, learned[1], state, train=True)
        return jnp.mean((y - target) ** 2), bn.measure(z)

    @jax.jit
    def step(learned, opt_state, state, seen, x, target):
        grads, moments = jax.grad(loss_fn, has_aux=True)(learned, x, target)
        updates, opt_state = multi.update(grads, opt_state, learned)
        learned = optax.apply_updates(learned, updates)
        # The recipe: merge what is seen; at an update, advance by it, and see anew.
        seen = bn.merge(seen, moments)
        new = bn.advance(state, seen, AVERAGE), jax.tree.map(jnp.zeros_like, seen)
        pick = multi.has_updated(opt_state)
        state, seen = jax.tree.map(lambda n, o: jnp.where(pick, n, o), new, (state, seen))
        return learned, opt_state, state, seen

    learned, seen = (kernel, params), jax.tree.map(jnp.zeros_like, bn.measure(jnp.ones((2, 3))))
    counts = []
    for batch, targets in zip(*examples, strict=True):
        for x, target in zip(batch, targets, strict=True):
            learned, opt_state, state, seen = step(learned, opt_state, state, seen, x, target)
            counts.append(state.count.tolist())
    assert counts == [[0] * 3] * 3 + [[1] * 3] * 4 + [[2] * 3]

    z = np.asarray(examples[0], np.float64) @ np.asarray(kernel, np.float64)
    z = z.reshape(2, PARTS * SIZE, 3)
    # The debiased average of two batches: 0.9/1.9 of the first, 1/1.9 of the second.
    weights = np.array([0.9, 1.0])[:, None] / 1.9
    mean, var = (weights * z.mean(1)).sum(0), (weights * z.var(1, ddof=1)).sum(0)
    # Products of 5 terms of about 50 in float32 carry 5·50·2⁻²⁴ = 1.5e-5 into z, and twice that
    # times a deviation of 3 or so into the variance.
    np.testing.assert_allclose(state.mean, mean, atol=1.5e-5)
    np.testing.assert_allclose(state.var, var, rtol=1e-5, atol=1e-4)
