"""Fold a batch norm into the linear layer beside it, which makes it free at inference.

With fixed statistics, batch normalization is an affine map per feature. A dense layer or a
convolution before it can do that map too, with another kernel and another bias. So can a dense
layer after it, but not a convolution after it: a convolution pads the normalized x with zeros, and
a zero there is not a zero of the x before normalization.

Kernels have flax's layouts: [in, out] for dense layers, [*window, in/groups, out] for convolutions
(grouped or not), and [*window, out, in] for a transposed convolution with transpose_kernel.
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

from bn_jax.core.dtypes import real_dtype, statistics_dtype
from bn_jax.core.normalize import BatchNormParams, as_affine
from bn_jax.core.state import BatchNormState

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

    If the mean E[x] comes from b, folding is accurate: b - E[x] is computed first, and y is within
    2e-6 of max|y| for E[x] up to 100 standard deviations. (The offset of `as_affine` is rounded
    before b could be added.) If the mean comes from xW, then xW is rounded relative to its own
    size, and the folded and the unfolded layer have about the same error.

    Args:
        kernel: W, [in, features].
        bias: b, [features], or None for 0.
        params: γ and β, [features], or None.
        state: E[x] and Var of the dense layer's output, [features].
        epsilon: ε ≥ 0, as in training.

    Returns:
        (kernel, bias) with the same shapes, in the kernel's dtype; computed in at least float32.
        There is a bias even if there was none.

    Raises:
        TypeError: kernel has no floating dtype, or is real while another value is complex; the
            variance is complex; a statistic is None.
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

    Equation, accuracy, dtypes and exceptions are those of `fold_dense`, for every filter. It works
    for any strides, padding, dilation and feature groups, because a filter's output is linear in
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
    """A transposed convolution and the batch normalization after it, as one transposed convolution.

    Equation, accuracy, dtypes and exceptions are those of `fold_dense`, for every filter.

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

    BN(x)W + b = xV + (b + βW - E[x]V), V = s·W, s = γ/√(Var + ε) per row. The bias is computed
    from the rounded V that is returned, so that the rounding of V acts on x - E[x] and not on x.

    This is less accurate than normalizing first: `normalize` subtracts E[x] before it multiplies,
    but here xV and E[x]V are rounded relative to their own size. If the means of x are R standard
    deviations from zero, the error of y is about R times as large. After an activation, R is about
    one.

    Args:
        kernel: W, [features, out].
        bias: b, [out], or None for 0.
        params: γ and β, [features], or None.
        state: E[x] and Var of the dense layer's input, [features].
        epsilon: ε ≥ 0, as in training.

    Returns:
        (kernel, bias) with the same shapes, in the kernel's dtype.

    Raises:
        TypeError, ValueError: as in `fold_dense`.

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
    """Fold into a layer whose features are one axis of its kernel."""
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
    """The common dtype; (s, E[x], β) and b in it, with zeros for what is None."""
    mean, var = jnp.asarray(state.mean), jnp.asarray(state.var)
    dtypes = [v.dtype for v in (kernel, mean) if jnp.issubdtype(v.dtype, jnp.inexact)]
    wide = functools.reduce(np.promote_types, map(statistics_dtype, dtypes))
    # Only the scale: the offset, β - s E[x], would be rounded before b could be added.
    state = state._replace(mean=mean.astype(wide), var=var.astype(real_dtype(wide)))
    scale, _ = as_affine(params, state, epsilon=epsilon)
    shift = jnp.zeros_like(scale) if params.bias is None else jnp.asarray(params.bias, wide)
    b = jnp.zeros((), wide) if bias is None else jnp.asarray(bias, wide)
    return wide, (scale, state.mean, shift), b


def check_kernel(kernel: Values, function: str, layout: str, fits: bool) -> None:
    """Refuse a kernel of another rank; the message names the function that was called."""
    if not fits:
        raise ValueError(
            f"kernel has shape {np.shape(kernel)}, but {function} takes {layout}; use the "
            "function for this kind of layer, e.g. fold_dense for Dense, fold_conv for Conv"
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
    """Refuse values whose dtype or shape does not fit the kernel; the message names the value."""
    for name, value in {"kernel": kernel, "bias": bias}.items():
        if value is not None and not jnp.issubdtype(value.dtype, jnp.inexact):
            raise TypeError(
                f"{name} has dtype {value.dtype}, but must be floating; convert it first, e.g. "
                f"{name}.astype(jnp.float32)"
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
                f"{name} is None; measure the layer's statistics first, e.g. with bn_jax.measure"
            )
        if value is None:
            continue
        if np.shape(value) != (size,):
            raise ValueError(
                f"{name} has shape {np.shape(value)}, but a kernel of shape {kernel.shape} needs "
                f"({size},); pass the values of the layer next to it, one per feature"
            )
        if name == "state.var" and jnp.iscomplexobj(value):
            raise TypeError(
                f"state.var has dtype {jnp.result_type(value)}, but a variance is real even for "
                "complex data; check that it is not the value of another entry"
            )
        if jnp.iscomplexobj(value) and not jnp.iscomplexobj(kernel):
            raise TypeError(
                f"{name} has dtype {jnp.result_type(value)} and kernel {kernel.dtype}; convert the "
                "kernel first, e.g. kernel.astype(jnp.complex64)"
            )
