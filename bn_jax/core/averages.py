"""How much of the past do we keep? The state, and the moving averages that advance it.

A moving average is a function `count -> weight kept of the past`: the count is how many batches
the running statistics have seen, the weight is between 0 (only the new batch) and 1 (only the
past). `Ema`, `DebiasedEma` and `CumulativeAverage` are three; an optax schedule, or any function
of one scalar, is another.

Differs from torch, whose `momentum` is the weight of the *new* batch (decay = 1 - momentum, and
`momentum=None` is `CumulativeAverage`); flax's and keras' `momentum` is our `decay`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Inexact, Int

from bn_jax.core.dtypes import statistics_dtype
from bn_jax.core.moments import Moments
from bn_jax.core.sums import share

Average = Callable[[Array], ArrayLike]
"""count (a scalar) -> weight kept of the past, in [0, 1]."""


class BatchNormState(NamedTuple):
    """What is remembered of the batches: the running statistics that inference normalizes by.

    Attributes:
        mean: running mean.
        var: running variance.
        count: how many batches each feature's statistics have seen. Per feature, because a
            feature whose moments are not finite skips the batch.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Int[Array, "*features"]  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclasses.dataclass(frozen=True)
class Ema:
    """Exponential moving average: keeps `decay` of the past at every step.

    running ← decay·running + (1 - decay)·batch. It starts from the initial state (mean 0, variance
    1) and forgets it only slowly: after t steps the initial state still weighs decayᵗ.
    `DebiasedEma` corrects that.

    Args:
        decay: in [0, 1]; 0 keeps the last batch only, 1 freezes the statistics.

    Raises:
        ValueError: decay is outside of [0, 1].

    >>> Ema(0.9)(5)
    0.9
    """

    decay: float | int

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The weight kept of the past: decay, whatever the count."""
        return self.decay


@dataclasses.dataclass(frozen=True)
class DebiasedEma:
    """Exponential moving average without the initial state's bias: exact after one step.

    The weights of an exponential average over the t batches seen, divided by their sum 1 - decayᵗ
    (Kingma & Ba 2015, section 3); as a recursion, the past keeps
    decay·(1 - decayᵗ)/(1 - decayᵗ⁺¹), which is 0 at t = 0 and tends to decay.

    Args:
        decay: in [0, 1]; 0 keeps the last batch only, and 1, the limit, averages all alike.

    Raises:
        ValueError: decay is outside of [0, 1].

    >>> [round(float(DebiasedEma(0.9)(t)), 3) for t in (0, 1, 10, 100)]
    [0.0, 0.474, 0.854, 0.9]
    """

    decay: float | int

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The weight kept of the past after count batches."""
        if self.decay == 1:
            return CumulativeAverage()(count)
        if self.decay == 0:
            return 0.0
        # 1 - decayᵗ = 2h/(1 + h) with h = tanh(-t/2 log decay): 1 - 0.9999ᵗ in float32 would lose
        # most of its digits, and expm1, which does not, takes XLA longer to compile (bench).
        h = jnp.tanh(-math.log(self.decay) / 2 * as_float(count))
        past = 2 * self.decay * h
        return past / (past + (1 - self.decay) * (1 + h))


@dataclasses.dataclass(frozen=True)
class CumulativeAverage:
    """The plain average of all batches seen: the t-th batch weighs 1/t.

    >>> [float(CumulativeAverage()(t)) for t in (0, 1, 3)]
    [0.0, 0.5, 0.75]
    """

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The weight kept of the past after count batches."""
        seen = as_float(count)
        return seen / (seen + 1)


def advance(
    state: BatchNormState, moments: Moments, average: Average, *, unbiased: bool = True
) -> BatchNormState:
    """The state after one more batch, whose moments are given.

    running ← k·running + (1 - k)·batch, with k = average(count) and, if unbiased, the batch's
    variance times m/(m - 1) (Ioffe & Szegedy 2015, section 3.1).

    Nothing bad enters: a feature keeps its state, count included, where the batch has no values
    (or, if unbiased, no more than one), or where its new statistics would not be finite. No
    gradient flows into the new state.

    Args:
        state: the running statistics.
        moments: of the batch, of the same shape.
        average: a scalar count -> weight kept of the past.
        unbiased: correct the batch's variance by m/(m - 1), where m is the count of moments (a sum
            of weights counts as that many values).

    Returns:
        The new state, in the dtypes of the old.

    Raises:
        TypeError: average is no function.
        ValueError: state and moments differ in shape.

    >>> import jax.numpy as jnp
    >>> from bn_jax.core.moments import measure
    >>> state = BatchNormState(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, int))
    >>> state = advance(state, measure(jnp.array([[1.0], [3.0]])), DebiasedEma(0.99))
    >>> state.mean.tolist(), state.var.tolist(), state.count.tolist()
    ([2.0], [2.0], [1])
    """
    if state.mean.shape != moments.mean.shape:
        raise ValueError(
            f"state is of {state.mean.shape} features and moments of {moments.mean.shape}; "
            "measure with the feature_axis that the state was made for"
        )
    check_average(average)
    state, moments = lax.stop_gradient((state, moments))
    real = statistics_dtype(state.var.dtype)
    kept = jnp.vectorize(lambda count: jnp.asarray(average(count), real))(state.count)
    new = share(moments.count, moments.count - 1) * moments.var if unbiased else moments.var

    def mix(past: Array | np.ndarray, new: Array | np.ndarray) -> Array:
        wide = statistics_dtype(past.dtype)
        mixed = kept.astype(wide) * past.astype(wide) + (1 - kept).astype(wide) * new.astype(wide)
        return mixed.astype(past.dtype)

    mean, var = mix(state.mean, moments.mean), mix(state.var, new)
    seen = moments.count > (1 if unbiased else 0)
    good = seen & jnp.isfinite(mean) & jnp.isfinite(var)
    return BatchNormState(
        lax.select(good, mean, state.mean),
        lax.select(good, var, state.var),
        state.count + good.astype(state.count.dtype),
    )


def check_average(average: object) -> None:
    """Refuse a number where a function of the count belongs."""
    if not callable(average):
        raise TypeError(
            f"average={average!r} must be a function, count -> weight of the past, e.g. "
            "DebiasedEma(0.99), Ema(0.99) or CumulativeAverage()"
        )


def check_decay(decay: float | int) -> None:
    """Refuse what is no weight."""
    if not 0 <= decay <= 1:
        raise ValueError(
            f"decay={decay} is outside of [0, 1]; it is the weight of the past (0.99 keeps 99%), "
            "where torch's momentum is the weight of the new batch: decay = 1 - momentum"
        )


def as_float(count: ArrayLike) -> Array:
    """A count in the widest float that is enabled."""
    return jnp.asarray(count, jnp.result_type(float))
