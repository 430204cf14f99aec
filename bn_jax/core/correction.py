"""The correction of Batch Renormalization: r and d, their limits, and the memory of σ (Ioffe 2017).

y = γ(x̂·r + d) + β is normalization with other parameters, γr and β + γd, where
r = clip(σ_B/σ, 1/r_max, r_max) and d = clip((μ_B - μ)/σ, -d_max, d_max). What is averaged is σ.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from bn_jax.core.averages import Average
from bn_jax.core.checks import as_floats, is_concrete
from bn_jax.core.moments import Moments, rest_of
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import BatchNormState, advance, batches_seen

Limit = ArrayLike | Callable[[Array], ArrayLike]
"""A number, or a schedule: count of batches -> number."""


def correction(
    moments: Moments, state: BatchNormState, epsilon: Array, r_max: Array, d_max: Array
) -> tuple[Array, Array]:
    """R and d."""
    batch, running = (
        jnp.sqrt(part.var.astype(epsilon.dtype) + epsilon) for part in (moments, state)
    )
    known = (moments.count > 0) & (batches_seen(state) > 0) & (running > 0) & (batch > 0)
    running = jnp.where(known, running, jnp.ones_like(running))
    r = jnp.clip(batch / running, 1 / r_max, r_max)
    moved = (moments.mean - state.mean.astype(moments.mean.dtype)) + rest_of(moments)
    d = moved / running.astype(moved.dtype)
    if jnp.iscomplexobj(d):
        d = d * jnp.minimum(1, d_max / jnp.maximum(jnp.abs(d), d_max)).astype(d.dtype)
    else:
        d = jnp.clip(d, -d_max, d_max)
    return jnp.where(known, r, jnp.ones_like(r)), jnp.where(known, d, jnp.zeros_like(d))


def corrected(params: BatchNormParams, r: Array, d: Array) -> BatchNormParams:
    """γr and β + γd."""
    scale, bias = as_floats(*params)
    if scale is None:
        return BatchNormParams(r, d if bias is None else bias.astype(d.dtype) + d)
    shift = scale.astype(d.dtype) * d
    scale = scale.astype(jnp.result_type(d if jnp.iscomplexobj(scale) else r))
    r = r.astype(scale.dtype)
    return BatchNormParams(scale * r, shift if bias is None else bias.astype(d.dtype) + shift)


def remember(
    state: BatchNormState, moments: Moments, average: Average, epsilon: ArrayLike
) -> BatchNormState:
    """The state after one more batch, with σ averaged instead of σ²."""
    seen = batches_seen(state)
    wide = moments.var.dtype
    epsilon = jnp.asarray(epsilon, wide)
    running = jnp.sqrt(state.var.astype(wide) + epsilon)
    # A new state stays one to `advance`, which knows it by its variance of 1.
    running = jnp.where(seen > 0, running, jnp.ones_like(running))
    batch = moments._replace(var=jnp.sqrt(moments.var + epsilon))
    new = advance(BatchNormState(state.mean, running, seen), batch, average, unbiased=False)
    var = jnp.maximum(new.var * new.var - epsilon, jnp.zeros_like(new.var))
    new, old = (
        new._replace(var=var),
        state._replace(mean=state.mean.astype(new.mean.dtype), var=state.var.astype(var.dtype)),
    )
    moved = new.count > seen
    return BatchNormState(*(jnp.where(moved, a, b) for a, b in zip(new, old, strict=True)))


def limit(name: str, value: Limit, state: BatchNormState) -> Array:
    """r_max or d_max, one or one per feature."""
    least = {"r_max": 1, "d_max": 0}[name]
    if callable(value):
        value = jnp.vectorize(value)(batches_seen(state))
    if is_concrete(value) and not (np.asarray(value) >= least).all():
        raise ValueError(f"{name}={value} must be at least {least}; r_max=1, d_max=0 is batch norm")
    return lax.stop_gradient(jnp.asarray(value, state.var.dtype))
