"""Batch normalization in float64 numpy, directly from the paper: the reference for all tests.

It is weighted throughout (a mask is weights of 0 and 1) and takes any feature axes. It is written
to be obviously right, and is slow.
"""

from typing import NamedTuple

import numpy as np

U = 2.0**-24
"""Unit roundoff of float32: the largest relative error of a correctly rounded result."""


class Forward(NamedTuple):
    """The results of Algorithm 1; statistics have the features' shape.

    >>> forward(np.array([[0.0], [2.0]]), epsilon=0.0).y.tolist()
    [[-1.0], [1.0]]
    """

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]
    normalized: np.ndarray
    inverse_std: np.ndarray


def forward(x, scale=1.0, bias=0.0, *, epsilon=1e-5, axis=-1, weights=None):
    """Algorithm 1: μ, σ², x̂ and y. y is β for padding that is not finite, and for a single value.

    Masks and integers count values; floats are weights. A feature with only one weight that is not
    0 has a single value.
    """
    counted = weights is None or np.asarray(weights).dtype.kind in "biu"
    x, weights = wide(x), filled(x, weights, axis)
    batch = batch_axes(x, axis)
    padding = (weights == 0) & ~np.isfinite(x)
    x = np.where(padding, 0, x)
    count = weights.sum(batch, keepdims=True)
    seen = np.where(count > 0, count, 1)
    mean = (weights * x).sum(batch, keepdims=True) / seen
    var = (weights * np.abs(x - mean) ** 2).sum(batch, keepdims=True) / seen
    padded = var + epsilon
    squares = count if counted else (weights**2).sum(batch, keepdims=True)
    known = (padded > 0) & (count**2 > squares * (1 + 1e-4))
    inverse_std = np.where(known, 1 / np.sqrt(np.where(known, padded, 1)), 0)
    normalized = np.where(padding, 0, (x - mean) * inverse_std)
    y = along(scale, x, axis) * normalized + along(bias, x, axis)
    mean, var, count, inverse_std = (
        part.squeeze(batch) for part in (mean, var, count, inverse_std)
    )
    return Forward(y, mean, var, count, normalized, inverse_std)


def backward(x, dy, scale=1.0, *, epsilon=1e-5, axis=-1, weights=None):
    """The paper's gradients (dx, dγ, dβ), simplified, with wᵢ/m in place of 1/m.

    dβ = Σ dy,  dγ = Σ dy·x̂,  dxᵢ = γ r (dyᵢ - (wᵢ/m) (Σ dy + x̂ᵢ Σ dy·x̂)).
    Padding that is not finite has y = β, whatever the other values are. So its dx is 0, and its dy
    is left out of the sums in dx.
    """
    f = forward(x, epsilon=epsilon, axis=axis, weights=weights)
    weights, batch, dy = filled(x, weights, axis), batch_axes(wide(x), axis), wide(dy)
    dbias = dy.sum(batch, keepdims=True)
    dscale = (dy * f.normalized).sum(batch, keepdims=True)
    outer = along(scale, dy, axis) * along(f.inverse_std, dy, axis)
    count = np.maximum(weights.sum(batch, keepdims=True), np.finfo(float).tiny)
    padding = (weights == 0) & ~np.isfinite(wide(x))
    dmean = np.where(padding, 0, dy).sum(batch, keepdims=True)
    dx = outer * (dy - weights / count * (dmean + f.normalized * dscale))
    dx = np.where(padding, 0, dx)
    return dx, dscale.squeeze(batch), dbias.squeeze(batch)


class Outcome(NamedTuple):
    """The results of a training step at γ = 1 and β = 0; the variance is biased.

    >>> outcome, _ = step(np.array([[0.0], [2.0]]), np.ones((2, 1)))
    >>> outcome.dbias.tolist()
    [2.0]
    """

    y: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def step(x, dy, *, epsilon=1e-5, weights=None):
    """A training step: its `Outcome`, and the `Forward` pass in it."""
    f = forward(x, epsilon=epsilon, weights=weights)
    gradients = backward(x, dy, epsilon=epsilon, weights=weights)
    return Outcome(f.y, *gradients, f.mean, f.var), f


def wide(x):
    """Convert to double precision."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def filled(x, weights, axis):
    """Weights broadcast to x's shape."""
    x = np.asarray(x)
    weights = np.ones(x.shape) if weights is None else np.asarray(weights).astype(np.float64)
    if weights.ndim < x.ndim:
        weights = np.expand_dims(weights, tuple(a % x.ndim for a in features(axis)))
    return np.broadcast_to(weights, x.shape)


def features(axis):
    """The feature axes as a tuple."""
    return (axis,) if isinstance(axis, int) else tuple(axis)


def batch_axes(x, axis):
    """All axes except the feature axes."""
    kept = {a % x.ndim for a in features(axis)}
    return tuple(a for a in range(x.ndim) if a not in kept)


def along(value, x, axis):
    """A value per feature, with axes of length 1 added so that it broadcasts against x."""
    value = np.asarray(value)
    return value if value.ndim == 0 else np.expand_dims(value, batch_axes(x, axis))
