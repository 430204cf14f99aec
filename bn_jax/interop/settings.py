"""The settings to convert besides the arrays: momentum, ε, and the kind of running variance.

A checkpoint holds arrays. The momentum and ε are arguments of the layer's constructor. Converters
take them by the other library's names and return our `Settings`:

    y, state = bn.batch_norm(x, params, state, train=True, **settings)
    layer = bn_jax.layers.linen.BatchNorm(**settings)

| | weight of the past | ε by default | running variance | count of batches |
|---|---|---|---|---|
| torch | 1 - `momentum`; None: a plain mean | 1e-5 | unbiased | `num_batches_tracked` |
| keras | `momentum` | 1e-3 | biased | none |
| haiku | `decay_rate`, debiased | 1e-5 | biased | `counter` |
| equinox | `momentum`, debiased or not by `mode` | 1e-5 | biased | with mode="batch" |
| flax | `momentum` | 1e-5 | biased | none |

**Biased or unbiased.** An unbiased running variance is m/(m - 1) times the biased one, where m is
the number of values per feature in a training batch: examples times locations. Converters copy the
variance unchanged, so evaluation stays the same, and the `Settings` say which kind it is. Nothing
else is needed to evaluate, or to train on with these settings.

Only if training goes on with the *other* convention, such as a flax state in torch, does m matter:
within about 1/(1 - decay) steps, the running variance drifts by the factor. That is 3% for a dense
layer with batches of 32, and 0.004% for a convolution on 32 images of 28×28. With
`values_per_feature=m`, the converter applies the factor at once.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.core.averages import Average
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import BatchNormState
from bn_jax.interop.checks import checkpoint_error
from bn_jax.interop.values import Values, read_ours


class Settings(TypedDict):
    """Keyword arguments for `bn_jax.batch_norm` and for our Flax layers.

    Attributes:
        average: the moving average.
        epsilon: ε.
        unbiased: whether the running variance is unbiased.

    >>> import bn_jax as bn
    >>> settings = Settings(average=bn.Ema(0.9), epsilon=1e-3, unbiased=False)
    >>> x = jnp.array([[0.0], [2.0]])
    >>> y, state = bn.batch_norm(x, *bn.init(1), train=True, **settings)
    """

    average: Average
    epsilon: float
    unbiased: bool


def convert_variance(
    var: np.ndarray, *, unbiased: bool, wanted: bool, values_per_feature: float | None
) -> np.ndarray:
    """Convert a running variance between biased and unbiased.

    From biased to unbiased it is var·m/(m - 1), and back var·(m - 1)/m (Ioffe & Szegedy 2015,
    section 3.1).

    Args:
        var: any shape.
        unbiased: whether var is unbiased.
        wanted: whether the result is to be unbiased.
        values_per_feature: m > 1; None returns var unchanged.

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
            f"values_per_feature={values_per_feature} must be above 1: it is the number of values "
            "per feature in a training batch, batch size × locations, e.g. 32 * 28 * 28"
        )
    if unbiased == wanted:
        return var
    factor = values_per_feature / (values_per_feature - 1)
    return (var * (factor if wanted else 1 / factor)).astype(var.dtype)


def as_settings(
    state: BatchNormState, average: Average, epsilon: float, values_per_feature: float | None
) -> tuple[BatchNormState, Settings]:
    """The state and settings of a layer with biased running variance; unbiased if m is given.

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
    """Check our values for another library, and convert the variance if m is given.

    Args:
        params: ours.
        state: ours.
        settings: ours.
        unbiased: whether the other library's running variance is unbiased.
        values_per_feature: m, or None.
        vector: all values must have the shape [features].

    Raises:
        CheckpointError: a value is malformed, or does not fit the others.
        TypeError: settings is not a dict with the keys of `Settings`.
        ValueError: values_per_feature is not above 1.

    >>> import bn_jax as bn
    >>> settings = {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": True}
    >>> read_outgoing(*bn.init(1), settings, unbiased=False, values_per_feature=2).var.tolist()
    [0.5]
    """
    if not isinstance(settings, Mapping) or not {"average", "epsilon", "unbiased"} <= {*settings}:
        raise TypeError(
            f"settings={settings!r}: give a dict of average, epsilon and unbiased, as from_torch "
            'returns, e.g. {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": True}'
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
    """The decay of an exponential moving average, debiased or not.

    Raises:
        CheckpointError: the average is of another kind.

    >>> import bn_jax as bn
    >>> decay_of({"average": bn.DebiasedEma(0.9), "epsilon": 1e-5, "unbiased": True}, "keras")
    0.9
    """
    average = settings["average"]
    decay = getattr(average, "decay", None)
    if decay is None:
        raise checkpoint_error(
            "settings['average']",
            f"is {average!r}, which {library} does not have",
            "choose how to go on, e.g. settings | {'average': bn_jax.Ema(0.99)}",
        )
    return float(decay)


def debias(decay: float, count: int, dtype: Any) -> np.ndarray:
    """1 - decayᵗ as haiku and equinox compute it, in the precision of their averages.

    expm1 would be more accurate, but the factor must be the very number that they divide by.

    >>> float(debias(0.5, 2, np.float32))
    0.75
    """
    with jax.numpy_dtype_promotion("standard"):
        power = jnp.power(jnp.asarray(decay, dtype), jnp.asarray(count))
        return np.asarray(jnp.ones((), dtype) - power)


def read_epsilon(epsilon: float) -> float:
    """Check ε and return it as a float.

    Raises:
        ValueError: it is negative or not finite.

    >>> read_epsilon(np.float32(0.5))
    0.5
    """
    if not 0 <= float(epsilon) < float("inf"):
        raise ValueError(f"epsilon={epsilon} must be finite and not negative, e.g. 1e-5")
    return float(epsilon)
