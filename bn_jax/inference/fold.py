"""What does batch normalization cost at inference? Nothing, next to a linear map.

Inference is an affine map per feature, and so are a dense layer and a convolution: with frozen
statistics the two are one, with another kernel and another bias. Four instances: a dense layer, a
convolution (grouped or not) and a transposed convolution before the normalization, and a dense
layer after it. A convolution *after* it is no instance: zeros padded to the normalized map are
not zeros of the map before.

Kernels have flax's layouts: [in, out], [*window, in/groups, out], and, for a transposed
convolution with transpose_kernel, [*window, out, in].
"""

from __future__ import annotations  # help() shows the names of types, not what they stand for

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Inexact, Shaped

from bn_jax.core.averages import BatchNormState
from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.normalize import BatchNormParams, as_affine

Values = Shaped[Array | np.ndarray, "..."] | Sequence[Any]
"""Arrays, or nested lists of numbers."""


def fold_dense(
    kernel: Values,
    bias: Values | None,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    epsilon: ArrayLike = 1e-5,
) -> tuple[Inexact[Array, "features_in features"], Inexact[Array, " features"]]:
    """A dense layer and the batch normalization after it, as one dense layer.

    BN(xW + b) = x(W·s) + (s (b - E[x]) + β), s = γ/√(Var + ε) per column  (Ioffe & Szegedy 2015,
    Algorithm 2, line 11; Jacob et al. 2018, section 3.2).

    Accurate where b carries the mean: b - E[x] comes first, which the offset of `as_affine` cannot
    do, and y is within 2e-6 of max|y| for E[x] up to 100 standard deviations. Where xW carries it,
    xW is rounded at its own size, folded or not: then both are off by about as much.

    Args:
        kernel: W, [in, features].
        bias: b, [features], or None for 0.
        params: γ and β, [features], or None.
        state: E[x] and Var of the dense layer's output, [features].
        epsilon: ε ≥ 0, as in training.

    Returns:
        (kernel, bias): of the same shapes, bias also where there was none, both in the kernel's
        dtype. Computed in at least float32.

    Raises:
        TypeError: kernel is not inexact, or is real where something else is complex; the variance
            is complex; a statistic is None.
        ValueError: a shape does not fit the kernel, or epsilon is negative or not finite.

    >>> import jax.numpy as jnp
    >>> state = BatchNormState(jnp.array([2.0]), jnp.array([4.0]), jnp.array([1]))
    >>> params = BatchNormParams(scale=None, bias=jnp.array([3.0]))
    >>> kernel, bias = fold_dense(jnp.array([[6.0]]), None, params, state, epsilon=0.0)
    >>> kernel.tolist(), bias.tolist()
    ([[3.0]], [2.0])
    """
    check_kernel(kernel, "fold_dense", "[in, features]", np.ndim(kernel) == 2)
    return fold_outputs(kernel, bias, params, state, epsilon, axis=-1)


def fold_conv(
    kernel: Values,
    bias: Values | None,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    epsilon: ArrayLike = 1e-5,
) -> tuple[Inexact[Array, "*window features_in features"], Inexact[Array, " features"]]:
    """A convolution and the batch normalization after it, as one convolution.

    The equation, accuracy, dtypes and exceptions of `fold_dense`, for every filter. Strides,
    padding of any kind, dilation and feature groups do not matter: a filter's output is linear in
    the filter.

    Args:
        kernel: [*window, in/groups, features].
        bias: [features], or None.
        params: γ and β, [features], or None.
        state: E[x] and Var of the convolution's output, [features].
        epsilon: ε ≥ 0, as in training.

    Returns:
        (kernel, bias).

    >>> import bn_jax as bn, jax.numpy as jnp
    >>> kernel, bias = fold_conv(jnp.ones((3, 3, 8, 16)), None, *bn.init(16))
    >>> kernel.shape, bias.shape
    ((3, 3, 8, 16), (16,))
    """
    check_kernel(kernel, "fold_conv", "[*window, in/groups, features]", np.ndim(kernel) > 2)
    return fold_outputs(kernel, bias, params, state, epsilon, axis=-1)


def fold_conv_transpose(
    kernel: Values,
    bias: Values | None,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    epsilon: ArrayLike = 1e-5,
    transpose_kernel: bool = False,
) -> tuple[Inexact[Array, "*window channels_a channels_b"], Inexact[Array, " features"]]:
    """A transposed convolution and the batch normalization after it, as one.

    The equation, accuracy, dtypes and exceptions of `fold_dense`, for every filter.

    Args:
        kernel: [*window, in, features], or [*window, features, in] with transpose_kernel.
        bias: [features], or None.
        params: γ and β, [features], or None.
        state: E[x] and Var of the convolution's output, [features].
        epsilon: ε ≥ 0, as in training.
        transpose_kernel: the argument of flax's ConvTranspose and of `jax.lax.conv_transpose`.

    Returns:
        (kernel, bias).

    >>> import bn_jax as bn, jax.numpy as jnp
    >>> kernel, bias = fold_conv_transpose(
    ...     jnp.ones((3, 3, 16, 8)), None, *bn.init(16), transpose_kernel=True)
    >>> kernel.shape, bias.shape
    ((3, 3, 16, 8), (16,))
    """
    layout = "[*window, features, in]" if transpose_kernel else "[*window, in, features]"
    check_kernel(kernel, "fold_conv_transpose", layout, np.ndim(kernel) > 2)
    return fold_outputs(kernel, bias, params, state, epsilon, axis=-2 if transpose_kernel else -1)


def fold_into_following_dense(
    kernel: Values,
    bias: Values | None,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    epsilon: ArrayLike = 1e-5,
) -> tuple[Inexact[Array, "features out"], Inexact[Array, " out"]]:
    """A batch normalization and the dense layer after it, as one dense layer.

    BN(x)W + b = xV + (b + βW - E[x]V), V = s·W, s = γ/√(Var + ε) per row. The V of the bias is
    the one that is returned: its roundings then act on x - E[x], not on x.

    Less accurate than `normalize` first, which takes x - E[x] before anything is multiplied: xV
    and E[x]V are rounded at their own size, so y is off by about as many times more as the means
    are standard deviations from zero. After an activation that is about one.

    Args:
        kernel: W, [features, out].
        bias: b, [out], or None for 0.
        params: γ and β, [features], or None.
        state: E[x] and Var of the dense layer's input, [features].
        epsilon: ε ≥ 0, as in training.

    Returns:
        (kernel, bias): of the same shapes, in the kernel's dtype.

    Raises:
        TypeError, ValueError: as `fold_dense` does.

    >>> import jax.numpy as jnp
    >>> state = BatchNormState(jnp.array([2.0]), jnp.array([4.0]), jnp.array([1]))
    >>> params = BatchNormParams(scale=None, bias=jnp.array([3.0]))
    >>> kernel, bias = fold_into_following_dense(
    ...     jnp.array([[6.0]]), None, params, state, epsilon=0.0)
    >>> kernel.tolist(), bias.tolist()
    ([[3.0]], [12.0])
    """
    check_kernel(kernel, "fold_into_following_dense", "[features, out]", np.ndim(kernel) == 2)
    kernel, bias = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    check_values(kernel, bias, params, state, features=kernel.shape[0], out=kernel.shape[1])
    wide, (scale, mean, shift), b = affine(kernel, bias, params, state, epsilon)
    new = (kernel.astype(wide) * scale[:, None]).astype(kernel.dtype)
    offset = lax.dot(shift, kernel.astype(wide), precision=lax.Precision.HIGHEST)
    offset -= lax.dot(mean, new.astype(wide), precision=lax.Precision.HIGHEST)
    return new, (offset + b).astype(kernel.dtype)


def fold_outputs(
    kernel: Values,
    bias: Values | None,
    params: BatchNormParams,
    state: BatchNormState,
    epsilon: ArrayLike,
    axis: int,
) -> tuple[Array, Array]:
    """What the first three have in common: the features are one axis of the kernel."""
    kernel, bias = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    size = kernel.shape[axis]
    check_values(kernel, bias, params, state, features=size, out=size)
    wide, (scale, mean, shift), b = affine(kernel, bias, params, state, epsilon)
    along = [1] * kernel.ndim
    along[axis] = size
    new = kernel.astype(wide) * scale.reshape(along)
    offset = scale * (b - mean) + shift
    return new.astype(kernel.dtype), offset.astype(kernel.dtype)


def affine(
    kernel: Array,
    bias: Values | None,
    params: BatchNormParams,
    state: BatchNormState,
    epsilon: ArrayLike,
) -> tuple[np.dtype, tuple[Array, Array, Array], Array]:
    """The common dtype, (s, E[x], β) and b in it; zeros for what is absent."""
    mean, var = jnp.asarray(state.mean), jnp.asarray(state.var)
    dtypes = [v.dtype for v in (kernel, mean) if jnp.issubdtype(v.dtype, jnp.inexact)]
    wide = functools.reduce(np.promote_types, map(statistics_dtype, dtypes))
    # The scale alone: its offset, β - s E[x], is rounded before b could take part.
    state = state._replace(mean=mean.astype(wide), var=var.astype(real_dtype(wide)))
    scale, _ = as_affine(params, state, epsilon=epsilon)
    shift = jnp.zeros_like(scale) if params.bias is None else jnp.asarray(params.bias, wide)
    b = jnp.zeros((), wide) if bias is None else jnp.asarray(bias, wide)
    return wide, (scale, state.mean, shift), b


def check_kernel(kernel: Values, function: str, layout: str, fits: bool) -> None:
    """Refuse a kernel of another rank, by the name of the function that was called."""
    if not fits:
        raise ValueError(
            f"kernel has shape {np.shape(kernel)}, but {function} takes {layout}; use the "
            "function of its layer, e.g. fold_dense for Dense, fold_conv for Conv"
        )


def check_values(
    kernel: Array,
    bias: Values | None,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    features: int,
    out: int,
) -> None:
    """Refuse what does not fit the kernel in kind or shape, by its name."""
    for name, value in {"kernel": kernel, "bias": bias}.items():
        if value is not None and not jnp.issubdtype(value.dtype, jnp.inexact):
            raise TypeError(
                f"{name} has dtype {value.dtype}, which has no fractions to scale; convert it "
                f"first, e.g. {name}.astype(jnp.float32)"
            )
    named = {
        "state.mean": (state.mean, features),
        "state.var": (state.var, features),
        "params.scale": (params.scale, features),
        "params.bias": (params.bias, features),
        "bias": (bias, out),
    }
    for name, (value, size) in named.items():
        if value is None and name.startswith("state"):
            raise TypeError(
                f"{name} is None; measure the layer's statistics first, e.g. by bn_jax.measure"
            )
        if value is None:
            continue
        if np.shape(value) != (size,):
            raise ValueError(
                f"{name} has shape {np.shape(value)}, but a kernel of shape {kernel.shape} needs "
                f"({size},); give the values of the layer next to it, one per feature"
            )
        if name == "state.var" and jnp.iscomplexobj(value):
            raise TypeError(
                f"state.var has dtype {jnp.result_type(value)}, but a variance is real, of complex "
                "data too: is it another entry's value?"
            )
        if jnp.iscomplexobj(value) and not jnp.iscomplexobj(kernel):
            raise TypeError(
                f"{name} has dtype {jnp.result_type(value)} and kernel {kernel.dtype}; convert the "
                "kernel first, e.g. kernel.astype(jnp.complex64)"
            )
