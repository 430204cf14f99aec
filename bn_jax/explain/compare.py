"""What a layer remembers, beside what the data are: numbers per feature, from which to judge.

Both are taken for normal distributions, of which normalization knows no more: mean and variance,
with ε. The distance between two is the symmetric Kullback-Leibler divergence

    J = ½ (v₁/v₂ + v₂/v₁ - 2) + ½ (μ₁ - μ₂)² (1/v₁ + 1/v₂),   v = σ² + ε,

which is 0 for the same, about the squared shift in standard deviations for means, and about half
the squared relative change for variances.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from bn_jax.core.population import Seen, finish
from bn_jax.core.state import BatchNormState
from bn_jax.core.sums import share, square


class Comparison(NamedTuple):
    """One layer, per feature.

    Attributes:
        distance: J of the running statistics and the training data.
        noise: what J would be on average for the statistics of a single batch, from how much the
            batches differ. A running average of n batches is at 1/n of it.
        between: the share of the data's variance that lies between the means of batches. 1/m for
            m independent values in a batch; nearly 1 where batches are pure.
        shift: J of the evaluation data and the training data; NaN without evaluation data.
        epsilon: the share of ε in σ² + ε of the data; 1 for a dead feature.
        variance: of the training data.
        new: the running statistics are 0 and 1, or 0 and 0, as before the first batch.
        finite: the running statistics are finite, and the variance is not negative.
        known: the training data have values and finite moments.
    """

    distance: Float[Array, "*features"]
    noise: Float[Array, "*features"]
    between: Float[Array, "*features"]
    shift: Float[Array, "*features"]
    epsilon: Float[Array, "*features"]
    variance: Float[Array, "*features"]
    new: Bool[Array, "*features"]
    finite: Bool[Array, "*features"]
    known: Bool[Array, "*features"]


def compare(
    running: BatchNormState, training: Seen, evaluation: Seen | None, epsilon: ArrayLike
) -> Comparison:
    """What a layer remembers beside what it sees; a pure function, under jit and vmap too."""
    data = finish(training, "pooled")
    epsilon = jnp.asarray(epsilon, data.var.dtype)
    v, between = data.var + epsilon, training.means.var
    nan = jnp.full_like(v, jnp.nan)
    return Comparison(
        distance=divergence(running, data, epsilon),
        noise=share(between, v) + share(share(training.variances.var, v), v) / 2,
        between=share(between, between + training.variances.mean),
        shift=nan
        if evaluation is None
        else divergence(finish(evaluation, "pooled"), data, epsilon),
        epsilon=share(jnp.broadcast_to(epsilon, v.shape), v),
        variance=data.var,
        new=(running.mean == 0) & ((running.var == 1) | (running.var == 0)),
        finite=jnp.isfinite(running.mean) & jnp.isfinite(running.var) & (running.var >= 0),
        known=data.count > 0,
    )


def divergence(a: BatchNormState, b: BatchNormState, epsilon: Array) -> Array:
    """J of two states, per feature."""
    wide = epsilon.dtype
    v, w = a.var.astype(wide) + epsilon, b.var.astype(wide) + epsilon
    moved = square(a.mean.astype(b.mean.dtype) - b.mean)
    ratio = square(v - w) / (v * w)  # v/w + w/v - 2, without cancellation
    return (ratio + moved * (1 / v + 1 / w)) / 2
