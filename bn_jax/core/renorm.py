"""Batch Renormalization: train by the batch, see what inference sees (Ioffe 2017).

Batch norm trains by μ_B and σ_B, and infers by the running μ and σ. With small batches, or with
batches of few classes, the two differ, and the network at inference is not the one that was
trained. Batch Renorm corrects the batch's statistics by numbers that are constants to the
derivative,

    y = γ(x̂·r + d) + β,   x̂ = (x - μ_B)/σ_B,   r = σ_B/σ,   d = (μ_B - μ)/σ,

so that y = γ(x - μ)/σ + β, as at inference, while the derivative still flows through μ_B and σ_B.
r and d are clipped, and training begins with no correction at all. This is `standardize` with
other parameters: γr and β + γd. With ghost groups, each group has its own r and d, as if vmap ran
over groups.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Inexact, Shaped

from bn_jax.core.averages import Average, DebiasedEma
from bn_jax.core.batch_norm import batch_norm
from bn_jax.core.checks import as_array, check_kind, check_train
from bn_jax.core.correction import corrected, correction, limit, remember
from bn_jax.core.ghost import Groups, read_groups
from bn_jax.core.layout import Layout, read_layout
from bn_jax.core.moments import Moments, degrees_of_freedom, pool_with
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.replicas import AxisIndexGroups, AxisName, Replicas, read_replicas, sum_over
from bn_jax.core.standardize import check_batch, standardize
from bn_jax.core.state import BatchNormState, read_state


def batch_renorm(
    x: Shaped[Array | np.ndarray, "..."],
    params: BatchNormParams,
    state: BatchNormState,
    *,
    train: bool | np.bool_ | Array,
    r_max: Any,
    d_max: Any,
    average: Average = DebiasedEma(0.99),
    epsilon: ArrayLike = 1e-5,
    feature_axis: SupportsIndex | Sequence[SupportsIndex] = -1,
    where: Shaped[Array | np.ndarray, "..."] | Sequence[Any] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    group_size: int | np.integer | None = None,
) -> tuple[Inexact[Array, "..."], BatchNormState]:
    """Batch norm whose training is corrected towards the running statistics.

    Training (Ioffe 2017, Algorithm 1), with σ_B = √(σ_B² + ε) of this batch and μ, σ of the state:
    y = γ(x̂·r + d) + β,  r = clip(σ_B/σ, 1/r_max, r_max),  d = clip((μ_B - μ)/σ, -d_max, d_max).
    No gradient flows through r and d. μ and σ then move towards μ_B and σ_B: it is σ that is
    averaged, not its square, and nothing is corrected by m/(m - 1). Inference is that of
    `batch_norm`.

    With r_max = 1 and d_max = 0, y is that of `batch_norm`, bit for bit. The paper trains so for
    5,000 steps, then raises r_max to 3 over 35,000 steps and d_max to 5 over 20,000; with optax,
    linear_schedule(1, 3, 35_000, transition_begin=5_000). A feature whose state has seen no batch
    is not corrected either, nor one whose σ or σ_B is 0.

    Args:
        x: as in `batch_norm`.
        params: as in `batch_norm`.
        state: as in `batch_norm`.
        train: correct the batch's statistics (True) or normalize by the state (False).
        r_max: at least 1. A number, may be traced; or a schedule, count of batches -> number.
        d_max: at least 0, likewise; in standard deviations. Of complex data, it limits |d|.
        average: as in `batch_norm`, and all that follow.
        epsilon: in units of variance.
        feature_axis: the axes that are kept.
        where: which values count. A feature that is left with one value is not remembered.
        axis_name: pool over this named axis.
        axis_index_groups: pool within groups of that axis.
        group_size: each group of this many neighbours on the leading batch axis is normalized by
            its own statistics, with its own r and d. The state moves towards the statistics of all
            groups together.

    Returns:
        (y, state), as `batch_norm`. The state's var is σ² - ε, so that all that takes the state of
        batch norm takes this.

    Raises:
        TypeError: as `batch_norm`.
        ValueError: as `batch_norm`; r_max is below 1 or d_max below 0.
        NameError: axis_name is not bound here.

    >>> import jax, bn_jax as bn
    >>> params, state = bn.init(3)
    >>> x = jax.random.normal(jax.random.key(0), (8, 3)) * 5 + 2
    >>> _, state = batch_renorm(x, params, state, train=True, r_max=9, d_max=5)
    >>> y, _ = batch_renorm(x[:2], params, state, train=True, r_max=9, d_max=5)
    >>> expected, _ = bn.batch_norm(x[:2], params, state, train=False)
    >>> bool(jnp.allclose(y, expected, atol=1e-5))   # where nothing was clipped
    True
    """
    check_train(train)
    options: dict[str, Any] = {"epsilon": epsilon, "feature_axis": feature_axis}
    if not train:
        return batch_norm(x, params, state, train=False, where=where, **options)
    check_kind("state", state, BatchNormState)
    check_kind("params", params, BatchNormParams)
    x, state = as_array(x), lax.stop_gradient(read_state(state))
    limits = [limit(name, value, state) for name, value in (("r_max", r_max), ("d_max", d_max))]
    run = partial(standardize_corrected, params=params, state=state, limits=limits, **options)
    layout = read_layout(x, feature_axis)
    groups = read_groups(layout, x, group_size)
    if groups is None:
        y, moments = run(x, where, axis_name=axis_name, axis_index_groups=axis_index_groups)
    else:
        replicas = read_replicas(axis_name, axis_index_groups)
        y, moments = in_groups(run, x, where, layout, groups, replicas)
    return y, remember(state, with_spread(moments), average, epsilon)


def standardize_corrected(
    x: Array,
    where: Any,
    *,
    params: BatchNormParams,
    state: BatchNormState,
    limits: Sequence[Array],
    **options: Any,
) -> tuple[Array, Moments]:
    """Y by the corrected statistics of x, and the moments of x."""
    # The compiler takes both calls' sums for one.
    _, moments = standardize(x, BatchNormParams(None, None), where=where, **options)
    moments = lax.stop_gradient(moments)
    epsilon = jnp.asarray(options["epsilon"], moments.var.dtype)
    r, d = correction(with_spread(moments), state, epsilon, *limits)
    y, _ = standardize(x, corrected(params, r, d), where=where, **options)
    return y, moments


def in_groups(
    run: Callable[..., tuple[Array, Moments]],
    x: Array,
    where: Any,
    layout: Layout,
    groups: Groups,
    replicas: Replicas | None,
) -> tuple[Array, Moments]:
    """Y of each ghost group, and the moments of all groups and replicas."""
    x = check_batch(layout, x, replicas, groups)
    x, weights = groups.split_batch(x, layout.full_weights(where, x))
    axis = groups.axis
    y, moments = jax.vmap(run, (axis, None if weights is None else axis), (axis, 0))(x, weights)

    def add(parts: Any) -> Any:
        summed = jax.tree.map(lambda part: jnp.sum(part, 0, keepdims=True), parts)
        return sum_over(summed, replicas)

    return groups.join(y), jax.tree.map(lambda part: part[0], pool_with(moments, add))


def with_spread(moments: Moments) -> Moments:
    """The moments, with a count of 0 where one value says nothing about σ."""
    left = degrees_of_freedom(moments.count, moments.squares)
    return moments._replace(count=jnp.where(left > 0, moments.count, jnp.zeros_like(left)))
