"""What must be converted beside the numbers: momentum, ε, and which variance is remembered.

A checkpoint holds arrays; how they go on, and what is added to the variance, stands in the layer's
constructor. Converters take that in the other library's words and return our `Settings`:

    y, state = bn.batch_norm(x, params, state, train=True, **settings)
    layer = bn_jax.layers.linen.BatchNorm(**settings)

| | weight of the past | ε by default | running variance | count of batches |
|---|---|---|---|---|
| torch | 1 - `momentum`; None: all alike | 1e-5 | unbiased | `num_batches_tracked` |
| keras | `momentum` | 1e-3 | biased | none |
| haiku | `decay_rate`, debiased | 1e-5 | biased | `counter` |
| equinox | `momentum`, debiased or not by `mode` | 1e-5 | biased | with mode="batch" |
| flax | `momentum` | 1e-5 | biased | none |

**Biased or unbiased** is the factor m/(m - 1) on the running variance, where m is how many values
of a feature one training batch held: its examples times its locations. Converters copy the variance
as it is, so that evaluation stays the same, and `Settings` say which one it is. That is all that is
needed to evaluate, or to go on training with these settings. m matters in one case: the copy shall
go on with the *other* convention, such as a flax state in torch. Then the running variance drifts
by the factor within some 1/(1 - decay) steps, which is 3% for a dense layer on batches of 32, and
0.004% for a convolution on 32 images of 28×28. Give `values_per_feature=m`, and it is converted at
once.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.core.averages import Average, BatchNormState
from bn_jax.core.normalize import BatchNormParams
from bn_jax.interop.checks import refusal
from bn_jax.interop.values import Values, read_ours


class Settings(TypedDict):
    """Keyword arguments of `bn_jax.batch_norm` and of our Flax layers.

    Attributes:
        average: the moving average.
        epsilon: ε.
        unbiased: whether the running variance is, and goes on to be.
    """

    average: Average
    epsilon: float
    unbiased: bool


def convert_variance(
    var: np.ndarray, *, unbiased: bool, wanted: bool, values_per_feature: float | None
) -> np.ndarray:
    """The running variance in the wanted convention, or as it is if m is not given.

    var·m/(m - 1) if unbiased is wanted of biased, var·(m - 1)/m in the other direction (Ioffe &
    Szegedy 2015, section 3.1).

    Args:
        var: any shape.
        unbiased: what it is.
        wanted: what it shall be.
        values_per_feature: m > 1; None copies.

    Raises:
        ValueError: values_per_feature is not above 1.

    >>> var = np.array([3.0])
    >>> convert_variance(var, unbiased=False, wanted=True, values_per_feature=4).tolist()
    [4.0]
    """
    if values_per_feature is None:
        return var
    if not values_per_feature > 1:
        raise ValueError(
            f"values_per_feature={values_per_feature} must be above 1: it is how many values of a "
            "feature one training batch held, batch size × locations, e.g. 32 * 28 * 28"
        )
    if unbiased == wanted:
        return var
    factor = values_per_feature / (values_per_feature - 1)
    return (var * (factor if wanted else 1 / factor)).astype(var.dtype)


def as_settings(
    state: BatchNormState, average: Average, epsilon: float, values_per_feature: float | None
) -> tuple[BatchNormState, Settings]:
    """A state whose variance is biased, and its settings; both unbiased if m is given.

    Raises:
        ValueError: epsilon is negative or not finite; values_per_feature is not above 1.

    >>> import bn_jax as bn
    >>> state, settings = as_settings(bn.init(1)[1], bn.Ema(0.9), 1e-5, values_per_feature=2)
    >>> state.var.tolist(), settings["unbiased"]
    ([2.0], True)
    """
    unbiased = values_per_feature is not None
    if unbiased:
        var = convert_variance(
            np.asarray(state.var),
            unbiased=False,
            wanted=True,
            values_per_feature=values_per_feature,
        )
        state = state._replace(var=jnp.asarray(var))
    return state, Settings(average=average, epsilon=read_epsilon(epsilon), unbiased=unbiased)


def read_outgoing(
    params: BatchNormParams,
    state: BatchNormState,
    settings: Settings,
    *,
    unbiased: bool,
    values_per_feature: float | None,
    vector: bool = True,
) -> Values:
    """Our values for another library, checked, the variance in its convention if m is given.

    Raises:
        CheckpointError: a value is malformed, or does not fit the others.
        TypeError: settings are none.
        ValueError: values_per_feature is not above 1.

    >>> import bn_jax as bn
    >>> settings = {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": True}
    >>> read_outgoing(*bn.init(1), settings, unbiased=False, values_per_feature=2).var.tolist()
    [0.5]
    """
    if not isinstance(settings, Mapping) or not {"average", "epsilon", "unbiased"} <= {*settings}:
        raise TypeError(
            f"settings={settings!r}: give a dict of average, epsilon and unbiased, as from_torch "
            'returns it, e.g. {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": True}'
        )
    ours = read_ours(params, state, vector=vector)
    var = convert_variance(
        ours.var,
        unbiased=settings["unbiased"],
        wanted=unbiased,
        values_per_feature=values_per_feature,
    )
    return ours._replace(var=var)


def decay_of(settings: Settings, library: str) -> float:
    """The decay of an exponential average; debiased or not is for the caller to tell.

    Raises:
        CheckpointError: the average is another one.

    >>> import bn_jax as bn
    >>> decay_of({"average": bn.DebiasedEma(0.9), "epsilon": 1e-5, "unbiased": True}, "keras")
    0.9
    """
    average = settings["average"]
    decay = getattr(average, "decay", None)
    if decay is None:
        raise refusal(
            "settings['average']",
            f"is {average!r}, which {library} has not",
            "choose how it shall go on, e.g. settings | {'average': bn_jax.Ema(0.99)}",
        )
    return float(decay)


def debias(decay: float, count: int, dtype: Any) -> np.ndarray:
    """1 - decayᵗ in the averages' own precision, as haiku and equinox compute it.

    Not by expm1: what they divide by must be what is multiplied here, digits lost included.

    >>> float(debias(0.5, 2, np.float32))
    0.75
    """
    with jax.numpy_dtype_promotion("standard"):
        power = jnp.power(jnp.asarray(decay, dtype), jnp.asarray(count))
        return np.asarray(jnp.ones((), dtype) - power)


def read_epsilon(epsilon: float) -> float:
    """A plain float, checked.

    Raises:
        ValueError: it is negative or not finite.

    >>> read_epsilon(np.float32(0.5))
    0.5
    """
    if not 0 <= float(epsilon) < float("inf"):
        raise ValueError(f"epsilon={epsilon} must be finite and not negative, e.g. 1e-5")
    return float(epsilon)
