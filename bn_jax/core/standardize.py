"""y together with its moments: each feature of a batch normalized by the batch itself.

y = γ r (x - μ) + β with r = 1/√(σ² + ε) depends on x through μ and σ² as well. Two steps see all of
x: `sums_about`, from which μ and σ² are made, and `apply_statistics`. Between them are numbers per
feature, and a sum over replicas if there are any. JAX differentiates each step by its own rule, and
the parts add up to the paper's backward pass (Ioffe & Szegedy 2015, section 3; g = ∂L/∂y):

    ∂L/∂β = Σ g,   ∂L/∂γ = Σ g x̂,   ∂L/∂x = γr (g - E[g] - x̂ E[g x̂])   with x̂ = r (x - μ).

No gradient is stopped except at the origin, on which nothing depends, so derivatives of all orders
are right. The backward pass keeps x, in its own dtype, and numbers per feature.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Inexact, Shaped

from bn_jax.core.checks import as_array, as_floats, check_epsilon, check_features, check_kind
from bn_jax.core.dtypes import real_dtype
from bn_jax.core.ghost import Groups, read_groups
from bn_jax.core.layout import Layout, read_layout
from bn_jax.core.moments import Moments, add_origin, degrees_of_freedom, mean_and_var, pool_centered
from bn_jax.core.normalize import (
    BatchNormParams,
    apply_statistics,
    bring_in_params,
    inverse_std,
)
from bn_jax.core.replicas import AxisIndexGroups, AxisName, Replicas, read_replicas, sum_over
from bn_jax.core.sums import Sums, origin_of, sums_about
from bn_jax.core.xla.barriers import marked, rounded
from bn_jax.core.xla.notice import notice_when_computed


def standardize(
    x: Shaped[Array | np.ndarray, "..."],
    params: BatchNormParams,
    *,
    epsilon: ArrayLike = 1e-5,
    feature_axis: SupportsIndex | Sequence[SupportsIndex] = -1,
    where: Shaped[Array | np.ndarray, "..."] | Sequence[Any] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    group_size: int | np.integer | None = None,
) -> tuple[Inexact[Array, "..."], Moments]:
    """Normalize each feature by the batch, and return the batch's moments as well.

    y = γ (x - μ)/√(σ² + ε) + β with the mean μ and biased variance σ² of this batch (Ioffe &
    Szegedy 2015, Algorithm 1). `batch_norm` in training is this, then `advance`.

    Args:
        x: float or complex, any shape.
        params: γ and β; either may be None.
        epsilon: as in `batch_norm`, like all that follow.
        feature_axis: the axes that are kept.
        where: which values count.
        axis_name: pool over this named axis.
        axis_index_groups: pool within groups of that axis.
        group_size: examples per group of ghost batch norm.

    Returns:
        (y, moments): y of x's shape and dtype; the moments, in at least float32, of all members of
        axis_name and of all groups. Both are differentiable.

    Raises:
        TypeError: as `batch_norm`.
        ValueError: as `batch_norm`.
        NameError: axis_name is not bound here.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (8, 3)) * 5 + 2
    >>> y, moments = standardize(x, BatchNormParams(None, None))
    >>> bool(jnp.allclose(moments.mean, x.mean(0), atol=1e-6)), moments.count.tolist()
    (True, [8.0, 8.0, 8.0])
    """
    x = as_array(x)
    layout = read_layout(x, feature_axis)
    check_kind("params", params, BatchNormParams)
    check_epsilon(epsilon)
    params = BatchNormParams(*as_floats(*params))
    check_features(layout.features, x, layout.axes, **params._asdict())
    replicas = read_replicas(axis_name, axis_index_groups)
    groups = read_groups(layout, x, group_size)
    x = check_batch(layout, x, replicas, groups)
    weights = layout.full_weights(where, x)
    return standardized(x, params, epsilon, weights, layout, replicas, groups)


@functools.partial(jax.jit, static_argnames=("layout", "replicas", "groups"))
def standardized(
    x: Array,
    params: BatchNormParams,
    epsilon: ArrayLike,
    weights: Array | None,
    layout: Layout,
    replicas: Replicas | None,
    groups: Groups | None,
) -> tuple[Array, Moments]:
    """`standardize`, with arguments that are checked; jitted, so that layers are traced once."""
    affine = bring_in_params(layout, params, x)
    x = rounded(x)
    epsilon = jnp.asarray(epsilon, real_dtype(affine[0].dtype))
    if groups is None:
        y, origin, near = by_own_moments(x, affine, epsilon, weights, replicas)
    else:
        y, origin, near = by_moments_of_groups(x, affine, epsilon, weights, replicas, groups)
    return y, jax.tree.map(layout.take_out, add_origin(origin, near))


def by_own_moments(
    x: Array,
    affine: tuple[Array, Array],
    epsilon: Array,
    weights: Array | None,
    replicas: Replicas | None,
) -> tuple[Array, Array, Moments]:
    """y, an origin near the mean, and the moments of x - origin over all replicas."""
    origin = marked(origin_of(x, weights, affine[0], replicas))
    wide = x.astype(origin.dtype)
    sums: Sums = marked(sum_over(sums_about(origin, x, wide, weights), replicas))
    mean, var = mean_and_var(sums)
    r = inverse_std(var, epsilon)
    if weights is not None:
        # A mask may leave one value or none. Their variance of 0 says nothing about the data, and
        # by 1/√ε the other rows would come out some hundreds of times too large.
        left = degrees_of_freedom(*lax.stop_gradient((sums.count, sums.squares)))
        r = lax.select(left > 0, r, jnp.zeros_like(r))
    y = apply_statistics(x, wide, origin, mean, r, affine, weights)
    return y, origin, Moments(mean, var, sums.count, sums.squares)


def by_moments_of_groups(
    x: Array,
    affine: tuple[Array, Array],
    epsilon: Array,
    weights: Array | None,
    replicas: Replicas | None,
    groups: Groups,
) -> tuple[Array, Array, Moments]:
    """Normalize each group by its own moments.

    Returns y, and, for the state, an origin and the moments of all groups and replicas.
    """
    x, weights = groups.split_batch(x, weights)
    affine = groups.repeat(affine[0]), groups.repeat(affine[1])
    y, origin, near = by_own_moments(x, affine, epsilon, weights, None)  # of this member alone
    pooled = pool_centered(origin, near, lambda parts: sum_over(groups.add(parts), replicas))
    origin, near = jax.tree.map(groups.drop_axis, pooled)
    return groups.join(y), origin, near


def check_batch(
    layout: Layout, x: Array, replicas: Replicas | None, groups: Groups | None
) -> Array:
    """Return x; computing it raises, or warns, if there is one value per feature."""
    if groups is not None:
        if math.prod([groups.smallest, *(x.shape[axis] for axis in layout.batch_axes[1:])]) != 1:
            return x
        found = f"group_size={groups.size} leaves a group of one of x of shape {x.shape}"
        remedy = "choose a group_size that leaves no single example over"
    else:
        if layout.count * (replicas.fewest if replicas else 1) != 1:
            return x
        where = " in a group of axis_index_groups" if replicas and replicas.groups else ""
        found = f"x of shape {x.shape} has one on feature axes {layout.axes}{where}"
        remedy = (
            "use a larger batch or group, pool with axis_name, or normalize by the running "
            "statistics (train=False)"
        )
    message = (
        f"training needs more than one value per feature, but {found}: its variance is zero and "
        f"y is bias whatever x is; {remedy}"
    )
    return notice_when_computed(message, x)
