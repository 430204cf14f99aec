"""Power sums and polynomials: what they are, each other's transposes, and what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.core.centered import polynomial, power_sums

# Shapes of x and of numbers per feature: cut in blocks along one axis or another, or along none.
CASES = [
    ((5, 14, 12, 12), (1, 1, 1, 12)),
    ((64, 3, 16, 4), (1, 1, 1, 4)),
    ((60, 200), (1, 200)),
    ((1021, 9), (1, 9)),
    ((1, 8), (1, 8)),
    ((6, 2, 5, 3), (1, 2, 1, 3)),
    ((8,), (1,)),
    ((4, 3), (4, 3)),
    ((2, 3, 2, 1, 2, 2, 3, 2), (1, 3, 1, 1, 2, 1, 1, 2)),
]


def draw(*shapes, seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def plain_sums(powers, x, origin, weights=None, times=None):
    """In double precision, from the definition."""
    d = np.asarray(x, float) - np.asarray(origin, float)
    g = np.ones_like(d) if times is None else np.asarray(times, float)
    keep = np.ones_like(d, bool) if weights is None else np.asarray(weights) > 0
    axes = tuple(axis for axis, size in enumerate(origin.shape) if size == 1)
    return [np.where(keep, g * d**k, 0).sum(axes, keepdims=True) for k in powers]


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["plain", "mask", "weights", "times"])
@pytest.mark.parametrize(("shape", "numbers"), CASES)
def test_sums_of_powers(shape, numbers, kind, run):
    x, origin, g = draw(shape, numbers, shape)
    options = {
        "plain": {},
        "mask": {"weights": x > 0},
        "weights": {"weights": g * g, "times": g * g},
        "times": {"times": g},
    }[kind]
    found = run(functools.partial(power_sums, (0, 1, 2)))(x, x, origin, **options)
    for one, truth in zip(found, plain_sums((0, 1, 2), x, origin, **options), strict=True):
        assert one.shape == numbers
        np.testing.assert_allclose(one, truth, rtol=1e-5, atol=1e-5)


def loss(sums, values, x, origin, mean, numbers, weights):
    """A curved function of both maps."""
    a, b = sums(x, origin, weights)
    y = values(x, origin, mean, [numbers * a, numbers + b], weights)
    return jnp.sum(jnp.tanh(y / 8)) + jnp.sum(a * b)


def ours_sums(x, origin, weights):
    times = None if weights is None or weights.dtype == bool else weights
    return power_sums((1, 2), x, x, origin, weights=weights, times=times)


def ours_values(x, origin, mean, coefficients, weights):
    return polynomial((0, 1), x, x, origin, mean, coefficients, weights=weights)


def jax_sums(x, origin, weights):
    d = x - origin
    axes = tuple(axis for axis, size in enumerate(origin.shape) if size == 1)
    w = jnp.ones_like(x) if weights is None else weights.astype(x.dtype)
    return [jnp.sum(w * d**k, axes, keepdims=True) for k in (1, 2)]


def jax_values(x, origin, mean, coefficients, weights):
    c, slope = coefficients
    return c + slope * (x - origin - mean)


@pytest.mark.parametrize("kind", ["plain", "mask", "weights"])
def test_derivatives_are_those_of_plain_jax(kind, shape=(5, 4, 3), numbers=(1, 1, 3)):
    """Forward, backward, and the Hessian by any mixture of modes, in double precision."""
    with jax.enable_x64(True):
        compare_derivatives(kind, *draw(shape, numbers, numbers, numbers, shape, dtype=np.float64))


def compare_derivatives(kind, x, origin, mean, c, w):
    weights = {"plain": None, "mask": w > 0, "weights": w * w}[kind]
    ours = lambda *at: loss(ours_sums, ours_values, at[0], origin, *at[1:], weights)  # noqa: E731
    plain = lambda *at: loss(jax_sums, jax_values, at[0], origin, *at[1:], weights)  # noqa: E731
    at, all_of = (x, mean, c), (0, 1, 2)

    def derivatives(f):
        return [
            jax.grad(f, all_of)(*at),
            jax.jvp(f, at, at)[1],
            jax.jacfwd(jax.grad(f, all_of), all_of)(*at),
            jax.jacrev(jax.grad(f, all_of), all_of)(*at),
        ]

    compare = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    jax.tree.map(compare, *map(jax.jit(derivatives, static_argnums=0), (ours, plain)))


def test_weights_have_a_derivative_at_zero(shape=(6, 3), numbers=(1, 3)):
    x, origin, w = draw(shape, numbers, shape)
    w = jnp.where(w > 0, w, 0.0)
    ours, plain = (
        jax.grad(lambda w, f=f: sum(jnp.sum(jnp.sin(s)) for s in f(x, origin, w)))(w)
        for f in (ours_sums, jax_sums)
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [(0, None), (None, 0), (1, 0)])
def test_vmap_adds_a_feature_axis(which, shape=(4, 6, 2), numbers=(1, 1, 2)):
    x, g = draw((3, *shape), (3, *shape))
    (origin,) = draw(numbers)
    run = lambda x, g: power_sums((0, 1), x, x, origin, times=g)  # noqa: E731
    given = [a if axis is not None else a[0] for a, axis in zip((x, g), which, strict=True)]
    axes = [0 if axis is not None else None for axis in which]
    found = jax.jit(jax.vmap(run, axes))(*given)
    for n in range(3):
        one = [a[n] if axis is not None else a for a, axis in zip(given, axes, strict=True)]
        for a, b in zip(found, run(*one), strict=True):
            np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything(shape=(4, 3), numbers=(1, 3)):
    x, origin, c = draw(shape, numbers, numbers)
    mask = jnp.ones(shape, bool).at[1].set(False)
    broken = x.at[1].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))

    def run(x):
        sums = power_sums((0, 1, 2), x, x, origin, weights=mask)
        return sums, polynomial((0, 1), x, x, origin, c, [c, c], weights=mask)

    with jax.debug_nans(True):
        sums, y = run(broken)
        gradient = jax.grad(lambda x: jnp.sum(run(x)[1]) + sum(map(jnp.sum, run(x)[0])))(broken)
    np.testing.assert_array_equal(sums, run(x.at[1].set(0.0))[0])
    np.testing.assert_array_equal(y[1], 0)
    np.testing.assert_array_equal(gradient[1], 0)


def test_the_backward_pass_needs_x_alone(shape=(64, 32), numbers=(1, 32)):
    x, origin, c = draw(shape, numbers, numbers)

    def pullback(x):
        def run(x):
            wide = x.astype(jnp.float32)
            a, b = power_sums((1, 2), x, wide, origin)
            return polynomial((0, 1), x, wide, origin, a, [b, c * b])

        return jax.vjp(run, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, x.astype(jnp.bfloat16)))
    assert [a.dtype for a in kept if a.size == x.size] == [jnp.bfloat16]


def first(shape, numbers):
    """1 where the axes that are averaged over begin, else 0."""
    x = np.zeros(shape, np.float32)
    x[tuple(0 if n == 1 else slice(None) for n in numbers)] = 1
    return x
