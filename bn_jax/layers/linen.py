"""`BatchNorm` for flax.linen: change the import, and keep model, checkpoints and training loop.

>>> from bn_jax.layers.linen import BatchNorm   # instead of: from flax.linen import BatchNorm
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.core.averages import Average
from bn_jax.core.layout import read_layout
from bn_jax.core.moments import measure
from bn_jax.core.normalize import BatchNormParams, normalize
from bn_jax.core.state import BatchNormState
from bn_jax.core.xla.notice import on_single_value
from bn_jax.layers.affine import apply_affine, own_or_given, split_affine
from bn_jax.layers.normalizer import choose_normalizer
from bn_jax.layers.single_value import warn
from bn_jax.layers.translate import (
    batches_seen,
    check_flag,
    flax_average,
    mean_dtype,
    promote,
    read_mask,
)


class BatchNorm(nn.BatchNorm):
    """Batch normalization with flax.linen's constructor, variables and call.

    Training normalizes each feature by the batch, y = γ (x - μ)/√(σ² + ε) + β, and moves the
    collection `batch_stats` (`mean`, `var`) towards μ and σ². The collection must be mutable in
    `apply`. Evaluation normalizes by the collection. The parameters γ and β are `scale` and `bias`.

    Differs from flax.linen.BatchNorm in

    - accuracy: no digits are lost where the mean is large compared with the standard deviation,
      whatever `use_fast_variance` says;
    - masks: masked-out values may be anything, NaN included, without harm to the gradients; a
      float mask holds weights; with `axis_name`, each device counts by its unmasked values;
    - the running statistics: an empty or fully masked batch, or a feature whose moments are not
      finite, leaves them unchanged, and no gradient flows into them;
    - training with one value per feature: y is `bias`, the running variance moves towards 0, and
      `bn_jax.layers.SingleValueWarning` says so;
    - mixed dtypes: they work under JAX's strict promotion too.

    Attributes:
        use_running_average: as in flax: True normalizes by the running statistics (evaluation),
            False by the batch (training). Give it either here or in the call.
        axis: as in flax: the feature axis, or several. All other axes are batch axes.
        momentum: as in flax: the weight of the past in the running statistics. torch's momentum is
            one minus this. May be an array or traced, with one value or one per feature.
        epsilon, param_dtype, use_bias, use_scale, bias_init, scale_init: as in flax.
        dtype: of the result. None takes the common dtype of x, scale and bias. Statistics are
            computed in at least float32.
        axis_name: as in flax: pool the statistics over this named axis, or several. Under plain
            `jit` it is not needed, because the statistics are those of the whole batch anyway.
        axis_index_groups: as in flax: pool within these groups of the axis's indices. Also works
            under `vmap` and `shard_map`.
        use_fast_variance, force_float32_reductions: accepted for compatibility, without effect.
            The variance is computed in one pass without cancellation; reductions and new
            `batch_stats` are at least float32.
        average: the moving average, a function from the number of batches seen to the weight of
            the past: `bn_jax.DebiasedEma(0.99)`, which is right from the first step, or an optax
            schedule. It replaces `momentum` and adds the variable `count` to `batch_stats`. If a
            checkpoint has no `count`, its statistics weigh as much as 1000 batches. None is
            flax's average, `bn_jax.Ema(momentum)`, without `count`.
        unbiased: multiply the running variance by m/(m - 1), as the paper and torch do. False is
            flax's behaviour.
        group_size: ghost batch norm: every group of this many neighbouring examples on the leading
            batch axis is normalized by its own statistics. The running statistics take all groups
            together. None normalizes the whole batch.
        renorm: Batch Renormalization by the limits (r_max, d_max), such as (3.0, 5.0); see
            `bn_jax.batch_renorm`. A limit may be a schedule of the number of batches, for which
            `average` is needed. Not with `unbiased`. None is batch norm.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (8, 3)) * 5 + 2
    >>> layer = BatchNorm(momentum=0.9)
    >>> variables = layer.init(jax.random.key(1), x, use_running_average=False)
    >>> jax.tree.map(jnp.shape, variables)
    {'batch_stats': {'mean': (3,), 'var': (3,)}, 'params': {'bias': (3,), 'scale': (3,)}}
    >>> y, updates = layer.apply(
    ...     variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> y = layer.apply(variables | updates, x[:1], use_running_average=True)
    """

    # Fields that flax's class lacks, or declares with a narrower type.
    axis: int | Sequence[int] = -1  # pyright: ignore[reportIncompatibleVariableOverride]
    axis_name: str | tuple[str, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    average: Average | None = None
    unbiased: bool = False
    group_size: int | None = None
    renorm: tuple[Any, Any] | None = None

    @nn.compact
    def __call__(
        self,
        x: Array | np.ndarray,
        use_running_average: bool | None = None,
        *,
        mask: Array | np.ndarray | None = None,
        scale: Array | np.ndarray | None = None,
        bias: Array | np.ndarray | None = None,
    ) -> Array:
        """Normalize x by its own statistics (training) or by the running ones (evaluation).

        In training mode, `init` normalizes by the batch too, but it does not update the running
        statistics, does not need `axis_name` to be bound, and accepts a batch of one.

        Args:
            x: any shape; integers are converted to float32.
            use_running_average: as in the constructor, if it was not given there.
            mask: which values the batch's statistics are computed over. True includes a value, an
                integer k counts it k times, and floats are weights, on any scale. The shape is
                x's, or x's without the feature axes, or broadcastable to either. In evaluation it
                only marks padding.
            scale: γ of this call, as in conditional batch norm and FiLM; make the layer with
                use_scale=False. One per feature, or one row of that per example, or of x's rank
                and broadcastable to x.
            bias: β of this call, likewise; make the layer with use_bias=False.

        Returns:
            y, with x's shape; its dtype is described at `dtype`.

        Raises:
            TypeError: use_running_average is traced.
            ValueError: use_running_average is given twice or not at all; the shape of a variable
                does not fit x; the shape of mask does not fit x, or fits in two ways;
                axis_index_groups do not contain every index of the axis once; scale or bias does
                not fit x, or the layer has its own.
            NameError: axis_name is not bound.
            flax.errors.ModifyScopeVariableError: a training step while `batch_stats` is immutable.
        """
        evaluate = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        check_flag(evaluate)
        x = jnp.asarray(x)
        layout = read_layout(x, self.axis)
        axes, shape = layout.axes, layout.features
        kind = mean_dtype(x.dtype, self.dtype, self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, kind)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        count = None
        if self.average is not None and (self.is_initializing() or not evaluate):
            count = self.variable("batch_stats", "count", jnp.zeros, shape, jnp.float32)
        own = BatchNormParams(None, None)
        if self.use_scale:
            own = own._replace(scale=self.param("scale", self.scale_init, shape, self.param_dtype))
        if self.use_bias:
            own = own._replace(bias=self.param("bias", self.bias_init, shape, self.param_dtype))
        params = own_or_given(own, (scale, bias))
        x, result = promote(x, params, self.dtype)
        params, outside = split_affine(params, x, axes)
        where = read_mask(mask, x, axes)

        if self.is_initializing() and not evaluate:
            # No running statistics, no collective, and no warning about one value per feature.
            batch = measure(x, feature_axis=axes, where=where)
            options = {"epsilon": self.epsilon, "feature_axis": axes, "where": where}
            y = normalize(x, batch.mean, batch.var, params, **options)
            return apply_affine(y, outside).astype(result)

        seen = batches_seen(None if count is None else count.value, mean.value)
        normalizer = choose_normalizer(self.renorm, self.unbiased, self.group_size)
        with on_single_value(warn):
            y, state = normalizer(
                x,
                params,
                BatchNormState(mean.value, var.value, seen),
                train=not evaluate,
                average=flax_average(self.momentum) if self.average is None else self.average,
                epsilon=self.epsilon,
                feature_axis=axes,
                where=where,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
            )
        if not evaluate:
            mean.value, var.value = state.mean, state.var
            if count is not None:
                count.value = state.count
        return apply_affine(y, outside).astype(result)
