"""How do statistics act on data?

Three instances: training normalizes by the batch's own moments (Algorithm 1 of Ioffe & Szegedy
2015, lines 3-4), inference by the running ones, test-time adaptation by those of the test batch.
`normalize` does not ask where the statistics came from.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Inexact, Shaped

from bn_jax.core.centered import add, center, polynomial
from bn_jax.core.checks import as_array, as_floats, check_epsilon, check_features, check_kind
from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.exported import exported
from bn_jax.core.layout import Layout, read_layout
from bn_jax.core.state import BatchNormState
from bn_jax.core.xla.barriers import downcast
from bn_jax.core.xla.primitives import operation


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
    rest: Inexact[Array | np.ndarray, "..."] | None = None,
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
        where: as in `measure`. A value that is masked out and NaN or infinite gets y = β, and
            gradients stay finite. All other outputs do not depend on it.
        rest: what rounding the mean lost, `Moments.rest`: with it, y is as accurate as that of
            `batch_norm`, also where the mean is many standard deviations.

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
    layout = read_layout(x, feature_axis)
    check_kind("params", params, BatchNormParams)
    check_epsilon(epsilon)
    mean, var, rest, *affine = as_floats(mean, var, rest, *params)
    params = BatchNormParams(*affine)
    values = {"mean": mean, "var": var, "rest": rest, **params._asdict()}
    check_features(layout.features, x, layout.axes, **values)
    weights = layout.full_weights(where, x)
    return normalized(x, mean, rest, var, params, epsilon, weights, layout)


@functools.partial(jax.jit, static_argnames="layout")
def normalized(
    x: Array,
    mean: Array,
    rest: Array | None,
    var: Array,
    params: BatchNormParams,
    epsilon: ArrayLike,
    weights: Array | None,
    layout: Layout,
) -> Array:
    """`normalize`, with arguments that are checked; jitted, so that layers are traced once.

    Without rest, as at inference, only standard JAX operations are used, because converters to
    other formats know no others. With rest, it is the accurate path of training.
    """
    mean, var = layout.bring_in(mean, x), layout.bring_in(var, x, real=True)
    affine = bring_in_params(layout, params, x)
    epsilon = jnp.asarray(epsilon, var.dtype)
    if rest is not None:
        r, rest = inverse_std(var, epsilon), layout.bring_in(rest, x)
        return apply_statistics(x, x.astype(mean.dtype), mean, rest, r, affine, weights)
    (scale, bias), (r,) = affine, plain_inverse_std(var, epsilon)
    d, _ = center(x, mean, weights, "broken")
    return (scale * r.astype(scale.dtype) * d + bias).astype(x.dtype)


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
    check_epsilon(epsilon)
    wide = statistics_dtype(state.mean.dtype)
    var = jnp.asarray(state.var, real_dtype(wide))
    multiplier = inverse_std(var, jnp.asarray(epsilon, var.dtype)).astype(wide)
    scale = multiplier if params.scale is None else multiplier * jnp.asarray(params.scale, wide)
    offset = -scale * jnp.asarray(state.mean, wide)
    return scale, offset if params.bias is None else offset + jnp.asarray(params.bias, wide)


# The pieces from which `normalize` and `standardize` are put together. Numbers per feature have x's
# rank here.


def bring_in_params(layout: Layout, params: BatchNormParams, x: Array) -> tuple[Array, Array]:
    """γ and β with x's rank, in the dtype of statistics; 1 and 0 for None."""
    return layout.bring_in(params.scale, x, missing=1.0), layout.bring_in(params.bias, x)


def apply_statistics(
    x: Array,
    wide: Array,
    origin: Array,
    mean: Array,
    r: Array,
    affine: tuple[Array, Array],
    weights: Array | None,
) -> Array:
    """γ r (x - origin - mean) + β in x's dtype; β where x is masked out and not finite.

    Args:
        x: what is kept for the backward pass.
        wide: x in the dtype of statistics, to which derivatives flow.
        origin: near the mean.
        mean: of x - origin.
        r: 1/√(σ² + ε).
        affine: γ and β.
        weights: of x's shape, or None.
    """
    scale, bias = affine
    slope = scale * r.astype(scale.dtype)
    if weights is None:
        y = polynomial((0, 1), x, wide, origin, mean, [bias, slope])
    else:
        y = polynomial((1,), x, wide, origin, mean, [slope], weights=weights) + bias
    return downcast(y, x.dtype)


def inverse_std(var: Array, epsilon: Array) -> Array:
    """1/√(σ² + ε), and 0 where that is 1/0: a feature without spread is centered, not scaled.

    NaN for a negative variance, even within ε: what is broken must be seen.
    """
    return bind_inverse_std(var, lax.broadcast(epsilon, var.shape))[0]


def plain_inverse_std(var, epsilon):
    """1/√(σ² + ε)."""
    padded = lax.select(var < 0, var, var + epsilon)
    flat, one = padded == 0, jnp.ones_like(padded)
    return [lax.select(flat, jnp.zeros_like(padded), lax.rsqrt(lax.select(flat, one, padded)))]


def inverse_std_jvp(operands, tangents):
    """ṙ = -r³ ((σ²)˙ + ε̇)/2; r³ itself would leave float32's range at a spread of 1e±13."""
    (r,), moved = bind_inverse_std(*operands), add(tangents)
    return [r], [None if moved is None else -0.5 * (r * (r * (r * moved)))]


bind_inverse_std = operation(
    "inverse_std", plain_inverse_std, lambda var, _: [var], jvp=inverse_std_jvp
)
