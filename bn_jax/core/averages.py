"""How much of the past do we keep? The state, and the moving averages that advance it.

A moving average is a function `count -> weight kept of the past`: the count is how many batches
the running statistics have seen, the weight is between 0 (only the new batch) and 1 (only the
past). `Ema`, `DebiasedEma` and `CumulativeAverage` are three; an optax schedule, or any function
of one scalar, is another. Where the weight is close to 1, the new batch's own weight, 1 minus it,
has few digits left in float32; the three averages here therefore give both, by `weights`.

Differs from torch, whose `momentum` is the weight of the *new* batch (decay = 1 - momentum, and
`momentum=None` is `CumulativeAverage`); flax's and keras' `momentum` is our `decay`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Inexact, Num

from bn_jax.core.axes import shard_like
from bn_jax.core.checks import as_floats, check_kind, is_concrete
from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.exported import exported
from bn_jax.core.moments import Moments, degrees_of_freedom
from bn_jax.core.sums import share

Average = Callable[[Array], ArrayLike]
"""count (a scalar) -> weight kept of the past, in [0, 1]."""

Decay = float | int | np.floating | np.integer | np.ndarray | Array

LOADED = 1000
"""How many batches statistics stand for that were loaded without a count.

Enough for averages that debias to have forgotten their start (0.99¹⁰⁰⁰ is 4e-5), and few enough for
`CumulativeAverage` to go on moving.
"""


@exported
class BatchNormState(NamedTuple):
    """What is remembered of the batches: the running statistics that inference normalizes by.

    Attributes:
        mean: running mean.
        var: running variance.
        count: how many batches each feature's statistics have seen. Per feature, because a
            feature whose moments are not finite skips the batch. An integer; a float is fine too,
            for those who average whole states.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Num[Array, "*features"]  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclasses.dataclass(frozen=True)
class Ema:
    """Exponential moving average: keeps `decay` of the past at every step.

    running ← decay·running + (1 - decay)·batch. It starts from the initial state (mean 0, variance
    1) and forgets it only slowly: after t steps the initial state still weighs decayᵗ.
    `DebiasedEma` corrects that.

    Args:
        decay: in [0, 1]; 0 keeps the last batch only, 1 freezes the statistics. May be traced,
            e.g. to sweep it under vmap.

    Raises:
        ValueError: decay is outside of [0, 1], or not one number.

    >>> Ema(0.9)(5)
    0.9
    """

    decay: Decay

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", read_decay(self.decay))

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The weight kept of the past: decay, whatever the count."""
        return self.decay

    def weights(self, count: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
        """The weights of the past and of the new batch."""
        return self.decay, 1 - self.decay


@dataclasses.dataclass(frozen=True)
class DebiasedEma:
    """Exponential moving average without the initial state's bias: exact after one step.

    The weights of an exponential average over the t batches seen, divided by their sum 1 - decayᵗ
    (Kingma & Ba 2015, section 3); as a recursion, the past keeps
    decay·(1 - decayᵗ)/(1 - decayᵗ⁺¹), which is 0 at t = 0 and tends to decay.

    Args:
        decay: in [0, 1]; 0 keeps the last batch only, and 1, the limit, averages all alike. May be
            traced, e.g. to sweep it under vmap.

    Raises:
        ValueError: decay is outside of [0, 1], or not one number.

    >>> [round(float(DebiasedEma(0.9)(t)), 3) for t in (0, 1, 10, 100)]
    [0.0, 0.474, 0.854, 0.9]
    """

    decay: Decay

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", read_decay(self.decay))

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The weight kept of the past after count batches."""
        return self.weights(count)[0]

    def weights(self, count: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
        """The weights of the past and of the new batch, (1 - decay)/(1 - decayᵗ⁺¹)."""
        seen, decay = as_float(count), self.decay
        if isinstance(decay, float | int):
            if decay in (0, 1):
                return (0.0, 1.0) if decay == 0 else CumulativeAverage().weights(count)
            rate = -math.log(decay)
        else:  # of a traced one, both ends are taken as the number next to them
            number = jnp.finfo(seen.dtype)
            decay = jnp.clip(jnp.asarray(decay, seen.dtype), number.tiny, 1 - number.epsneg)
            rate = -jnp.log(decay)
        # 1 - decayᵗ = 2h/(1 + h) with h = tanh(-t/2 log decay): 1 - 0.9999ᵗ in float32 would lose
        # most of its digits, and expm1, which does not, takes XLA longer to compile (bench).
        h = jnp.tanh(rate / 2 * seen)
        past, new = 2 * decay * h, (1 - decay) * (1 + h)
        return past / (past + new), new / (past + new)


@dataclasses.dataclass(frozen=True)
class CumulativeAverage:
    """The plain average of all batches seen: the t-th batch weighs 1/t.

    >>> [float(CumulativeAverage()(t)) for t in (0, 1, 3)]
    [0.0, 0.5, 0.75]
    """

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The weight kept of the past after count batches."""
        return self.weights(count)[0]

    def weights(self, count: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
        """The weights of the past and of the new batch."""
        seen = as_float(count)
        return seen / (seen + 1), 1 / (seen + 1)


def advance(
    state: BatchNormState, moments: Moments, average: Average, *, unbiased: bool = True
) -> BatchNormState:
    """The state after one more batch, whose moments are given.

    running ← k·running + (1 - k)·batch, with k = average(count) and, if unbiased, the batch's
    variance times m/(m - 1) (Ioffe & Szegedy 2015, section 3.1).

    Nothing bad enters: a feature keeps its state, count included, where the batch has no values
    (or, if unbiased, no more than one), where its new statistics would not be finite, or where k
    is outside of [0, 1]. No gradient flows into the new state.

    Loaded statistics are not lost: where the count is 0, but mean and var are not those of a new
    state (0 and 1, or zeros), they stand for 1000 batches (`batches_seen`).

    Args:
        state: the running statistics.
        moments: of the batch, of the same shape.
        average: a scalar count -> weight kept of the past.
        unbiased: correct the batch's variance by m/(m - 1), where m is the count of moments; of
            float weights, by n/(n - 1) with the effective count n = (Σw)²/Σw², which does not
            depend on their scale (`Moments`).

    Returns:
        The new state. Its statistics are float32 at least: half precision could not hold a small
        step. Where the state is spread over an explicit mesh, the new one is spread alike.

    Raises:
        TypeError: state or moments is of another kind, or average is no function.
        ValueError: state and moments differ in shape, or average returned a number outside of
            [0, 1].

    >>> import jax.numpy as jnp
    >>> from bn_jax.core.moments import measure
    >>> state = BatchNormState(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, int))
    >>> state = advance(state, measure(jnp.array([[1.0], [3.0]])), DebiasedEma(0.99))
    >>> state.mean.tolist(), state.var.tolist(), state.count.tolist()
    ([2.0], [2.0], [1])
    """
    check_kind("state", state, BatchNormState)
    check_kind("moments", moments, Moments)
    state = read_state(state)
    moments = Moments(*as_floats(*moments))
    if state.mean.shape != moments.mean.shape:
        raise ValueError(
            f"state is of {state.mean.shape} features and moments of {moments.mean.shape}; "
            "measure with the feature_axis that the state was made for"
        )
    check_average(average)
    state, moments = lax.stop_gradient((state, moments))
    own = jax.typeof(state.mean).sharding.spec
    moments = Moments(*(shard_like(part, own) for part in moments))
    mean, var = (part.astype(statistics_dtype(part.dtype)) for part in state[:2])
    count = batches_seen(state)
    kept, new = weights_of(average, count, real_dtype(var.dtype))
    left = degrees_of_freedom(moments.count, moments.squares)
    batch_var = share(moments.count, left) * moments.var if unbiased else moments.var

    def mix(past: Array, batch: Array) -> Array:
        # From the side that weighs more, so that a weight of 0 or 1 gives the other side exactly,
        # and weights that were rounded need not sum to 1.
        batch, real = batch.astype(past.dtype), real_dtype(past.dtype)
        difference = batch - past
        near_past = past + new.astype(real).astype(past.dtype) * difference
        near_batch = batch - kept.astype(real).astype(past.dtype) * difference
        return jnp.where(new <= kept, near_past, near_batch)

    new_mean, new_var = mix(mean, moments.mean), mix(var, batch_var)
    seen = (left if unbiased else moments.count) > 0
    weight = (kept >= 0) & (kept <= 1)
    good = seen & weight & jnp.isfinite(new_mean) & jnp.isfinite(new_var)
    return BatchNormState(
        jnp.where(good, new_mean, mean),
        jnp.where(good, new_var, var),
        jnp.where(good, count + jnp.ones_like(count), state.count),
    )


def read_state(state: BatchNormState) -> BatchNormState:
    """The state in arrays of JAX, also where it holds lists or numbers."""
    mean, var = as_floats(state.mean, state.var)
    return BatchNormState(mean, var, jnp.asarray(state.count))


def batches_seen(state: BatchNormState) -> Array:
    """How many batches each feature's statistics stand for.

    The count; but `LOADED` where that is 0 and mean and var are neither those of a new state, 0 and
    1, nor both 0: then somebody has put them there, from a checkpoint that counts nothing.
    """
    mean, var, count = map(jnp.asarray, state)
    loaded = (count == 0) & ((mean != 0) | ((var != 1) & (var != 0)))
    return jnp.where(loaded, jnp.full_like(count, LOADED), count)


def weights_of(average: Average, count: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The weights of the past and of the new batch, for each feature's count.

    A Python number has its complement in double precision; of an array, it is 1 minus the array.

    Raises:
        ValueError: the weight is known, and outside of [0, 1].
    """

    def of_one(count: Array) -> tuple[Array, Array]:
        kept = average(count)
        check_weight(kept, average)
        return jnp.asarray(kept, dtype), jnp.asarray(1 - kept, dtype)

    exact = getattr(average, "weights", None)
    pair = jnp.vectorize(of_one)(count) if exact is None else exact(count)
    kept, new = (jnp.asarray(weight, dtype) for weight in pair)
    check_weight(kept, average)
    return lax.stop_gradient((kept, new))


def check_weight(kept: ArrayLike, average: object) -> None:
    """Refuse what is no weight, where it is known."""
    if is_concrete(kept) and ((np.asarray(kept) < 0) | (np.asarray(kept) > 1)).any():
        raise ValueError(
            f"average={average!r} returned {kept}, which is outside of [0, 1]; it must return the "
            "weight of the past, e.g. 0.99"
        )


def check_average(average: object) -> None:
    """Refuse a number where a function of the count belongs."""
    if not callable(average):
        raise TypeError(
            f"average={average!r} must be a function, count -> weight of the past, e.g. "
            "DebiasedEma(0.99), Ema(0.99) or CumulativeAverage()"
        )


def read_decay(decay: Decay) -> Decay:
    """A decay as a Python number, which hashes by value; a traced one stays as it is.

    Raises:
        ValueError: it is no weight, or not one number.
    """
    if np.shape(decay):
        raise ValueError(
            f"decay has shape {np.shape(decay)}, but is one number; for several, e.g. "
            "jax.vmap(lambda decay: batch_norm(..., average=Ema(decay)))"
        )
    if isinstance(decay, jax.core.Tracer):
        return decay
    check_decay(decay)
    return decay if isinstance(decay, int) else float(decay)


def check_decay(decay: Decay) -> None:
    """Refuse what is no weight."""
    if not 0 <= decay <= 1:
        raise ValueError(
            f"decay={decay} is outside of [0, 1]; it is the weight of the past (0.99 keeps 99%), "
            "where torch's momentum is the weight of the new batch: decay = 1 - momentum"
        )


def as_float(count: ArrayLike) -> Array:
    """A count in the widest float that is enabled."""
    return jnp.asarray(count, jnp.result_type(float))
