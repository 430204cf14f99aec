"""What is remembered: the running statistics, and the step by which a batch moves them."""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Inexact, Num

from bn_jax.core.averages import Average, weight_of_new_batch
from bn_jax.core.checks import as_floats, check_average, check_kind
from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.exported import exported
from bn_jax.core.layout import shard_like
from bn_jax.core.moments import Moments, degrees_of_freedom, merge
from bn_jax.core.sums import share

LOADED = 1000
"""How many batches statistics stand for that were loaded without a count.

Enough for averages that debias to have forgotten their start (0.99¹⁰⁰⁰ is 4e-5), and few enough for
`CumulativeAverage` to go on moving.
"""


@exported
class BatchNormState(NamedTuple):
    """What is remembered of the batches: the running statistics that inference normalizes by.

    Attributes:
        mean: running mean, at least float32 once it has moved.
        var: running variance, likewise.
        count: how many batches each feature's statistics have seen. Per feature, because a
            feature whose moments are not finite skips the batch. An integer; a float is fine too,
            for those who average whole states.

    >>> import bn_jax as bn
    >>> params, state = bn.init(3)
    >>> state.mean.tolist(), state.var.tolist(), state.count.tolist()
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0, 0, 0])
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Num[Array, "*features"]  # pyright: ignore[reportIncompatibleMethodOverride]


State = TypeVar("State", BatchNormState, Moments)


def advance(state: State, moments: Moments, average: Average, *, unbiased: bool = True) -> State:
    """The state after one more batch, whose moments are given.

    running ← k·running + (1 - k)·batch, with k = average(count) and, if unbiased, the batch's
    variance times m/(m - 1) (Ioffe & Szegedy 2015, section 3.1).

    Nothing bad enters: a feature keeps its state, count included, where the batch has no values
    (or, if unbiased, no more than one), where its new statistics would not be finite, or where k
    is outside of [0, 1]. No gradient flows into the new state.

    Loaded statistics are not lost: where the count is 0, but mean and var are not those of a new
    state (0 and 1, or zeros), they stand for 1000 batches (`batches_seen`).

    Moments in the place of the state forget nothing: the batch's are merged into them, whatever the
    average. So a network that is called with moments of nothing says what its layers have seen.

    Args:
        state: the running statistics, or moments.
        moments: of the batch, of the same shape.
        average: a scalar count -> weight kept of the past.
        unbiased: correct the batch's variance by m/(m - 1), where m is the count of moments; of
            float weights, by n/(n - 1) with the effective count n = (Σw)²/Σw², which does not
            depend on their scale (`Moments`).

    Returns:
        The new state. Its statistics are float32 at least: half precision could not hold a small
        step. Where the state is sharded over an Explicit mesh, the new one is sharded alike.

    Raises:
        TypeError: state or moments is of another kind, or average is no function.
        ValueError: state and moments differ in shape, or average returned a number outside of
            [0, 1].

    >>> import jax.numpy as jnp, bn_jax as bn
    >>> params, state = bn.init(1)
    >>> moments = bn.measure(jnp.array([[1.0], [3.0]]))
    >>> state = advance(state, moments, bn.DebiasedEma(0.99))
    >>> state.mean.tolist(), state.var.tolist(), state.count.tolist()
    ([2.0], [2.0], [1])
    """
    if not isinstance(state, Moments) or not isinstance(moments, Moments):
        check_kind("state", state, BatchNormState)
        check_kind("moments", moments, Moments)
    moments = Moments(*as_floats(*moments))
    if isinstance(state, Moments):
        return merge(Moments(*as_floats(*state)), lax.stop_gradient(moments))
    state = read_state(state)
    if state.mean.shape != moments.mean.shape:
        raise ValueError(
            f"state is of {state.mean.shape} features and moments of {moments.mean.shape}; "
            "measure with the feature_axis that the state was made for"
        )
    check_average(average)
    state, moments = lax.stop_gradient((state, moments))
    count = batches_seen(state)
    new = weight_of_new_batch(average, count, real_dtype(statistics_dtype(state.var.dtype)))
    return advanced(state, moments, count, new, unbiased)


@functools.partial(jax.jit, static_argnames="unbiased")
def advanced(
    state: BatchNormState, moments: Moments, count: Array, new: Array, unbiased: bool
) -> BatchNormState:
    """`advance`, with arguments that are checked; jitted, so that layers are traced once."""
    own = jax.typeof(state.mean).sharding.spec
    moments = jax.tree.map(lambda part: shard_like(part, own), moments)
    mean, var = (part.astype(statistics_dtype(part.dtype)) for part in state[:2])
    left = degrees_of_freedom(moments.count, moments.squares)
    batch_var = share(moments.count, left) * moments.var if unbiased else moments.var
    new_mean, new_var = mix(mean, moments.mean, new), mix(var, batch_var, new)
    good = (left if unbiased else moments.count) > 0
    good = good & (new >= 0) & (new <= 1) & jnp.isfinite(new_mean) & jnp.isfinite(new_var)
    return BatchNormState(
        lax.select(good, new_mean, mean),
        lax.select(good, new_var, var),
        lax.select(good, count + jnp.ones_like(count), state.count),
    )


def mix(past: Array, batch: Array, new: Array) -> Array:
    """Past + new·(batch - past); from the heavier side, so that weights of 0 and 1 are exact."""
    new, batch = new.astype(past.dtype), batch.astype(past.dtype)
    difference, heavy = batch - past, jnp.real(new) > 0.5
    step = lax.select(heavy, new - jnp.ones_like(new), new) * difference
    return lax.select(heavy, batch, past) + step


def read_state(state: BatchNormState | Moments) -> BatchNormState:
    """The state in JAX arrays, also where it holds lists or numbers."""
    mean, var = as_floats(state.mean, state.var)
    return BatchNormState(mean, var, jnp.asarray(state.count))


def batches_seen(state: BatchNormState) -> Array:
    """How many batches each feature's statistics stand for.

    The count; but `LOADED` where that is 0 and mean and var are neither those of a new state, 0 and
    1, nor both 0: then somebody has put them there, from a checkpoint that counts nothing.
    """
    mean, var, count = map(jnp.asarray, state)
    loaded = (count == 0) & ((mean != 0) | ((var != 1) & (var != 0)))
    return lax.select(loaded, jnp.full_like(count, LOADED), count)
