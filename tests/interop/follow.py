"""What the tests of all converters share: batches, and one library followed by ours."""

import jax.numpy as jnp
import numpy as np

import bn_jax as bn

RANDOM = np.random.default_rng(0)
FEATURES = 5


def batches(steps, shape=(32, FEATURES), seed=0, axis=-1):
    """Batches whose features differ in mean and spread, and whose statistics drift."""
    random = np.random.default_rng(seed)
    each = [1] * len(shape)
    each[axis] = shape[axis]
    mean = random.normal(0, 3, each)
    std = random.uniform(0.3, 3, each)
    drift = 1 + 0.1 * np.arange(steps)
    return [(mean + std * d * random.normal(size=shape)).astype(np.float32) for d in drift]


def targets(xs, seed=1):
    random = np.random.default_rng(seed)
    return [random.normal(size=x.shape).astype(np.float32) for x in xs]


def vectors(seed=2, features=FEATURES):
    """Random scale, bias, mean and positive var."""
    random = np.random.default_rng(seed)
    scale, bias, mean = random.normal(size=(3, features)).astype(np.float32)
    return scale, bias, mean, random.uniform(0.1, 9, features).astype(np.float32)


def error(ours, theirs):
    """The largest difference, in units of 1 or of the largest value if that is greater."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    return float(np.abs(ours - theirs).max(initial=0) / max(1, np.abs(theirs).max(initial=0)))


def assert_close(ours, theirs, bar=1e-5):
    assert error(ours, theirs) <= bar


def assert_same(a, b):
    """Equal to the bit, and of one dtype."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def follow(converted, evaluate, train, xs, *, axis=-1, read=None, bar=1e-5):
    """Ours goes on where another library is, and both evaluate and train alike.

    Args:
        converted: (params, state, settings).
        evaluate: x -> their y.
        train: x -> their y, moving their statistics.
        xs: batches.
        read: () -> their (mean, var) of evaluation.
        bar: for evaluation and statistics, where theirs are inaccurate.
    """
    params, state, settings = converted
    for x in xs:
        y, kept = bn.batch_norm(
            jnp.asarray(x), params, state, train=False, epsilon=settings["epsilon"],
            feature_axis=axis,
        )  # fmt: skip
        assert kept is state
        assert_close(y, evaluate(x), bar)
        y, state = bn.batch_norm(
            jnp.asarray(x), params, state, train=True, feature_axis=axis, **settings
        )
        assert_close(y, train(x))
        if read is not None:
            mean, var = read()
            assert_close(state.mean, mean, bar)
            assert_close(state.var, var, bar)
    return state
