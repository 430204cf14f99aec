"""How do statistics act on data?

Three instances: training normalizes by the batch's own moments (Algorithm 1 of Ioffe & Szegedy
2015, lines 3-4), inference by the running ones, test-time adaptation by those of the test batch.
`normalize` does not ask where the statistics came from.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Inexact, Shaped

from bn_jax.core.averages import BatchNormState
from bn_jax.core.axes import (
    Axes,
    collapse,
    feature_axes,
    feature_shape,
    feature_spec,
    shard_like,
    spread,
    spread_where,
)
from bn_jax.core.checks import as_array, as_floats, check_kind
from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.exported import exported
from bn_jax.core.sums import is_padding, zero_where


@exported
class BatchNormParams(NamedTuple):
    """What is learned: y = scale·x̂ + bias, γ and β of the paper. Either may be None.

    Attributes:
        scale: γ, or None for 1.
        bias: β, or None for 0.
    """

    scale: Inexact[Array, "*features"] | None
    bias: Inexact[Array, "*features"] | None


def normalize(
    x: Shaped[Array | np.ndarray, "..."],
    mean: Inexact[Array | np.ndarray, "..."],
    var: Float[Array | np.ndarray, "..."],
    params: BatchNormParams,
    *,
    epsilon: ArrayLike = 1e-5,
    feature_axis: SupportsIndex | Sequence[SupportsIndex] = -1,
    where: Shaped[Array | np.ndarray, "..."] | Sequence[Any] | None = None,
) -> Inexact[Array, "..."]:
    """Normalize each feature by the given statistics, then scale and shift it.

    y = γ (x - μ)/√(σ² + ε) + β  (Algorithm 1, lines 3-4). Differentiable in everything. Where
    σ² + ε = 0 (a constant feature and ε = 0), y = β and the gradient is finite. A negative σ² can
    only be a mistake, and shows as NaN.

    Args:
        x: float or complex, any shape.
        mean: μ, one per feature.
        var: σ², one per feature.
        params: γ and β, one per feature, or None.
        epsilon: ε ≥ 0, in the units of var.
        feature_axis: the axes that mean, var and params belong to, in the order of x's axes.
        where: as in `measure`. Padding, excluded and not finite, gives y = β and spoils no
            gradient; all other outputs do not depend on it.

    Returns:
        y, of x's shape and dtype; computed in at least float32.

    Raises:
        TypeError: x is not inexact.
        ValueError: a shape does not fit x, or epsilon is negative or not finite.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0], [3.0]])
    >>> params = BatchNormParams(scale=jnp.array([10.0]), bias=None)
    >>> normalize(x, jnp.array([2.0]), jnp.array([1.0]), params, epsilon=0.0).tolist()
    [[-10.0], [10.0]]
    """
    x = as_array(x)
    axes = feature_axes(x, feature_axis)
    check_kind("params", params, BatchNormParams)
    mean, var, *affine = as_floats(mean, var, *params)
    params = BatchNormParams(*affine)
    check_features(x, axes, mean=mean, var=var, scale=params.scale, bias=params.bias)
    spec = feature_spec(x, axes)
    mean, var, *affine = (shard_like(part, spec) for part in (mean, var, *params))
    params = BatchNormParams(*affine)
    shape, wide = x.shape, statistics_dtype(x.dtype)
    weights = None if where is None else spread_where(where, x, axes)
    padding = is_padding(x, weights)
    x, axes = collapse(zero_where(padding, x), axes)
    centered = x.astype(wide) - spread(jnp.asarray(mean, wide), x, axes)
    if padding is not None:
        centered = zero_where(padding.reshape(x.shape), centered)
    multiplier = inverse_std(jnp.asarray(var, real_dtype(wide)), epsilon)
    return transform(centered, multiplier, params, axes).astype(x.dtype).reshape(shape)


def as_affine(
    params: BatchNormParams, state: BatchNormState, *, epsilon: ArrayLike = 1e-5
) -> tuple[Inexact[Array, "*features"], Inexact[Array, "*features"]]:
    """The inference map as y = scale·x + offset (Algorithm 2, line 11).

    scale = γ/√(Var + ε), offset = β - scale·E[x]. For folding into a neighbouring linear map; to
    normalize data, `normalize` is more accurate, since x - E[x] comes first.

    Returns:
        (scale, offset), one per feature, in at least float32.

    Raises:
        ValueError: epsilon is negative or not finite.

    >>> import jax.numpy as jnp
    >>> state = BatchNormState(jnp.array([2.0]), jnp.array([4.0]), jnp.array([1]))
    >>> scale, offset = as_affine(BatchNormParams(None, None), state, epsilon=0.0)
    >>> scale.tolist(), offset.tolist()
    ([0.5], [-1.0])
    """
    check_kind("params", params, BatchNormParams)
    check_kind("state", state, BatchNormState)
    params = BatchNormParams(*as_floats(*params))
    state = BatchNormState(*as_floats(*state))
    wide = statistics_dtype(state.mean.dtype)
    multiplier = inverse_std(jnp.asarray(state.var, real_dtype(wide)), epsilon).astype(wide)
    scale = multiplier if params.scale is None else multiplier * jnp.asarray(params.scale, wide)
    offset = -scale * jnp.asarray(state.mean, wide)
    return scale, offset if params.bias is None else offset + jnp.asarray(params.bias, wide)


# The pieces from which `normalize` and `batch_norm` are put together.


def transform(centered: Array, multiplier: Array, params: BatchNormParams, axes: Axes) -> Array:
    """γ·multiplier·centered + β, in the dtype of centered."""
    wide = centered.dtype
    multiplier = multiplier.astype(wide).reshape(feature_shape(centered, axes))
    if params.scale is not None:
        multiplier = multiplier * jnp.asarray(params.scale, wide).reshape(multiplier.shape)
    y = centered * spread(multiplier, centered, axes)
    return y if params.bias is None else y + spread(jnp.asarray(params.bias, wide), y, axes)


def inverse_std(var: Array, epsilon: ArrayLike) -> Array:
    """1/√(σ² + ε), and 0 where that is 1/0: a feature without spread is centered, not scaled.

    NaN of a variance that is negative, also within ε: what is broken must be seen.
    """
    check_epsilon(epsilon)
    padded = lax.select(var < 0, var, var + jnp.asarray(epsilon, var.dtype))
    flat, one = padded == 0, jnp.ones_like(padded)
    return lax.select(flat, jnp.zeros_like(padded), lax.rsqrt(lax.select(flat, one, padded)))


def check_epsilon(epsilon: ArrayLike) -> None:
    """Refuse what can only be a mistake; a traced epsilon is taken as it is."""
    if np.shape(epsilon):
        raise ValueError(f"epsilon has shape {np.shape(epsilon)}, but is one number, e.g. 1e-5")
    if not isinstance(epsilon, jax.core.Tracer) and not 0 <= np.asarray(epsilon) < np.inf:
        raise ValueError(f"epsilon={epsilon} must be finite and not negative, e.g. 1e-5")


def check_features(x: Array, axes: Axes, **values: Array | np.ndarray | None) -> None:
    """Refuse per-feature values that do not fit x in shape or complexity, by their names."""
    shape = feature_shape(x, axes)
    for name, value in values.items():
        if value is not None and mixes_complex(name, value, x):
            raise TypeError(
                f"{name} has dtype {value.dtype} and x {x.dtype}; the mean of complex data is "
                f"complex and their var real, as init({shape}, dtype=jnp.{x.dtype}) makes them; "
                "for real data all are real"
            )
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but x of shape {x.shape} has features of "
                f"shape {shape} on axes {axes}; set feature_axis, or init({shape})"
            )


def mixes_complex(name: str, value: Array | np.ndarray, x: Array) -> bool:
    """Whether a value would lose its imaginary part, or x its own to a real mean."""
    if name == "mean":
        return jnp.iscomplexobj(value) != jnp.iscomplexobj(x)
    return jnp.iscomplexobj(value) and (name == "var" or not jnp.iscomplexobj(x))
