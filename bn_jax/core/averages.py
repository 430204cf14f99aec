"""How much of the past do we keep? A moving average is a function of the count.

The count is how many batches the running statistics have seen. The result is the weight kept of the
past, between 0 (only the new batch) and 1 (only the past). `Ema`, `DebiasedEma` and
`CumulativeAverage` are three of them; an optax schedule, or any function of a scalar, is another.

Differs from torch, whose `momentum` is the weight of the *new* batch (decay = 1 - momentum, and
`momentum=None` is `CumulativeAverage`). The `momentum` of flax and keras is our `decay`.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from bn_jax.core.checks import check_decay, check_weight

Decay = float | int | np.floating | np.integer | np.ndarray | Array


@runtime_checkable
class Average(Protocol):
    """A moving average: any function of a scalar count that returns the weight kept of the past.

    A weight close to 1 leaves few digits for the new batch's weight, 1 minus it, in float32. An
    average may therefore have a method `new_weight(count)` as well, which returns that directly.

    >>> import bn_jax as bn
    >>> def last_ten(count):                     # an average of your own
    ...     return jnp.minimum(count / (count + 1), 0.9)
    >>> params, state = bn.init(2)
    >>> y, state = bn.batch_norm(jnp.eye(2), params, state, train=True, average=last_ten)
    >>> state.mean.tolist()
    [0.5, 0.5]
    """

    def __call__(self, count: Array, /) -> ArrayLike:
        """The weight kept of the past, in [0, 1], after count batches."""
        ...


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

    def new_weight(self, count: ArrayLike) -> ArrayLike:
        """The weight of the new batch, 1 - decay."""
        return 1 - self.decay


@dataclasses.dataclass(frozen=True)
class DebiasedEma:
    """Exponential moving average without the initial state's bias: exact after one step.

    The weights of an exponential average over the t batches seen, divided by their sum 1 - decayᵗ
    (Kingma & Ba 2015, section 3). As a recursion, the past keeps
    decay·(1 - decayᵗ)/(1 - decayᵗ⁺¹), which is 0 at t = 0 and tends to decay.

    Args:
        decay: in [0, 1]; 0 keeps the last batch only, and 1, the limit, weighs all batches alike.
            May be traced, e.g. to sweep it under vmap.

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
        return 1 - self.new_weight(count)

    def new_weight(self, count: ArrayLike) -> ArrayLike:
        """The weight of the new batch, (1 - decay)/(1 - decayᵗ⁺¹)."""
        seen, decay = as_float(count), self.decay
        if isinstance(decay, float | int):
            if decay in (0, 1):
                return 1.0 if decay == 0 else CumulativeAverage().new_weight(count)
            rate = -math.log(decay)
        else:  # for a traced one, the numbers next to 0 and 1 stand for them
            number = jnp.finfo(seen.dtype)
            decay = jnp.clip(jnp.asarray(decay, seen.dtype), number.tiny, 1 - number.epsneg)
            rate = -jnp.log(decay)
        # 1 - decayᵗ = 2h/(1 + h) with h = tanh(-t/2 log decay). In float32, 1 - 0.9999ᵗ would lose
        # most of its digits; expm1 does not, but takes XLA longer to compile (bench).
        h = jnp.tanh(rate / 2 * seen)
        new = (1 - decay) * (1 + h)
        return new / (2 * decay * h + new)


@dataclasses.dataclass(frozen=True)
class CumulativeAverage:
    """The plain average of all batches seen: the t-th batch weighs 1/t.

    >>> [float(CumulativeAverage()(t)) for t in (0, 1, 3)]
    [0.0, 0.5, 0.75]
    """

    def __call__(self, count: ArrayLike) -> ArrayLike:
        """The weight kept of the past after count batches."""
        return 1 - self.new_weight(count)

    def new_weight(self, count: ArrayLike) -> ArrayLike:
        """The weight of the new batch."""
        return 1 / (as_float(count) + 1)


def weight_of_new_batch(average: Average, count: Array, dtype: jnp.dtype) -> Array:
    """The weight of the new batch for each feature's count, by an average.

    Raises:
        ValueError: the weight is known, and outside of [0, 1].
    """

    def complement(count: Array) -> Array:
        kept = average(count)
        check_weight(kept, average)
        return jnp.asarray(1 - kept, dtype)  # a Python float is subtracted in double precision

    directly = getattr(average, "new_weight", None)
    if directly is not None:
        return lax.stop_gradient(jnp.asarray(directly(count), dtype))
    weight = lax.stop_gradient(jnp.vectorize(complement)(count))
    check_weight(1 - weight, average)
    return weight


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


def as_float(count: ArrayLike) -> Array:
    """A count in the widest float that is enabled."""
    return jnp.asarray(count, jnp.result_type(float))
