"""Batch normalization: measure the batch, normalize by it, remember it."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Inexact, Shaped

from bn_jax.core.averages import Average, DebiasedEma
from bn_jax.core.checks import (
    as_array,
    as_floats,
    as_integers,
    check_features,
    check_kind,
    check_train,
)
from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.layout import read_layout
from bn_jax.core.moments import Moments
from bn_jax.core.normalize import BatchNormParams, normalize
from bn_jax.core.replicas import AxisIndexGroups, AxisName
from bn_jax.core.standardize import standardize
from bn_jax.core.state import BatchNormState, State, advance, read_state


def init(
    features: SupportsIndex | Sequence[SupportsIndex],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> tuple[BatchNormParams, BatchNormState]:
    """Parameters γ = 1, β = 0 and a state of mean 0, variance 1 that has seen nothing.

    Args:
        features: how many, or a shape for several feature axes.
        use_scale: False leaves γ out (None), e.g. before a linear layer that scales anyway.
        use_bias: False leaves β out (None).
        dtype: of the parameters; complex for complex data. The state is float32 at least, since
            half precision could not hold the small steps that it takes.

    Raises:
        ValueError: a size is negative.
        TypeError: a size is no integer, or dtype is not inexact.

    >>> params, state = init(64)
    >>> params.scale.shape, state.mean.shape
    ((64,), (64,))
    """
    shape = as_integers("features", features)
    if any(size < 0 for size in shape):
        raise ValueError(f"features={features} must not be negative")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"dtype={jnp.dtype(dtype)} has no fractions; choose e.g. jnp.float32")
    params = BatchNormParams(
        jnp.ones(shape, dtype) if use_scale else None,
        jnp.zeros(shape, dtype) if use_bias else None,
    )
    wide = statistics_dtype(dtype)
    mean, var = jnp.zeros(shape, wide), jnp.ones(shape, real_dtype(wide))
    return params, BatchNormState(mean, var, jnp.zeros(shape, jnp.int32))


def batch_norm(
    x: Shaped[Array | np.ndarray, "..."],
    params: BatchNormParams,
    state: State,
    *,
    train: bool | np.bool_ | Array,
    average: Average = DebiasedEma(0.99),
    epsilon: ArrayLike = 1e-5,
    feature_axis: SupportsIndex | Sequence[SupportsIndex] = -1,
    where: Shaped[Array | np.ndarray, "..."] | Sequence[Any] | None = None,
    unbiased: bool = True,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    group_size: int | np.integer | None = None,
) -> tuple[Inexact[Array, "..."], State]:
    """Normalize each feature by the batch and remember the batch, or by what was remembered.

    Training (Ioffe & Szegedy 2015, Algorithm 1): y = γ (x - μ)/√(σ² + ε) + β with the mean μ and
    biased variance σ² of this batch; the state moves towards them, the variance times m/(m - 1).
    Inference (Algorithm 2): the same with the state's mean and variance; the state is returned as
    it came.

    Args:
        x: float or complex, any shape; what is not a feature axis is batch, so a convolution's
            m is batch × locations (section 3.2).
        params: γ and β, or None for either.
        state: the running statistics; in training, no gradient flows into the new one. `Moments`
            in their place are merged with the batch's (`advance`).
        train: normalize by the batch (True) or by the state (False). A Python bool: under jit,
            mark it static.
        average: how much of the past the state keeps, count -> weight: `DebiasedEma`, `Ema`,
            `CumulativeAverage`, or any callable of a scalar count, e.g. an optax schedule.
        epsilon: ε ≥ 0, in units of variance; may be traced.
        feature_axis: the axes that are kept, negatives allowed; 1 for [batch, channels, ...].
        where: which values count in the batch's statistics: a bool mask (True counts), integers (k
            counts as k copies of the value), or non-negative floats (importances, on any scale;
            differentiable). Of x's shape, or x's shape without the feature axes, or broadcastable
            to either. Every value of x gets an output. A value that is masked out and NaN or
            infinite gets y = β, and gradients stay finite; at inference, where does no more than
            that. If a feature (or its group) is left with one value or none, y = β for all of it.
        unbiased: remember the variance times m/(m - 1), as the paper does; False remembers σ²
            itself, as flax and keras do. Normalization uses σ² itself in either case. m counts
            values; of float weights, it is the effective count (Σw)²/Σw² (Kish 1965), so that
            only their proportions matter (numpy.cov's fweights and aweights differ likewise).
        axis_name: pool the statistics over this named axis, or several, of vmap, shard_map or
            pmap. If it is forgotten under shard_map, JAX refuses to return the state as
            replicated. Not used at inference.
        axis_index_groups: pool within groups of that axis only, a partition of its indices, e.g.
            [[0, 1], [2, 3]]. Each group has a state of its own.
        group_size: ghost batch norm: each group of this many neighbours on the leading batch axis
            is normalized by its own statistics; examples left over form a last, smaller group. The
            state moves towards the moments of all groups together, with axis_name those of all
            members, so that it does not depend on group_size. Not used at inference.

    Returns:
        (y, state): y of x's shape and dtype. In float32, y is β or NaN if values exceed about
        10¹⁹/√m, because their squares overflow. A feature's state stays as it was where the batch
        is empty or fully masked, or its moments are not finite.

    Raises:
        TypeError: x is not inexact, train is traced or no bool, where is no mask and no weights,
            params or state is of another kind, average is no function, group_size no integer.
        ValueError: a shape does not fit x; epsilon is negative; axis_index_groups do not hold each
            index of the axis once; group_size is not positive; training with one value per
            feature, whose variance is always zero (raised when y is computed or compiled, not by
            `jax.eval_shape`).
        NameError: axis_name is not bound here.

    >>> import jax, jax.numpy as jnp
    >>> params, state = init(3)
    >>> x = jax.random.normal(jax.random.key(0), (8, 3)) * 5 + 2
    >>> y, state = batch_norm(x, params, state, train=True)
    >>> bool(jnp.allclose(y.mean(0), 0, atol=1e-6)), bool(jnp.allclose(y.std(0), 1, atol=1e-3))
    (True, True)
    >>> y, _ = batch_norm(x[:1], params, state, train=False)
    """
    x = as_array(x)
    check_train(train)
    check_kind("params", params, BatchNormParams)
    if not isinstance(state, Moments):
        check_kind("state", state, BatchNormState)
    layout = read_layout(x, feature_axis)
    params, given = BatchNormParams(*as_floats(*params)), read_state(state)
    check_features(layout.features, x, layout.axes, **params._asdict(), **given._asdict())
    with jax.named_scope("batch_norm"):
        options = {"epsilon": epsilon, "feature_axis": layout.axes, "where": where}
        if not train:
            return normalize(x, given.mean, given.var, params, **options), state
        pooling = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
        y, moments = standardize(x, params, **options, **pooling, group_size=group_size)
        return y, advance(state, moments, average, unbiased=unbiased)
