"""`BatchNorm` for flax.linen: change the import, and keep model, checkpoints and training loop.

>>> from bn_jax.layers.linen import BatchNorm   # instead of: from flax.linen import BatchNorm
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from bn_jax.core.averages import Average, BatchNormState
from bn_jax.core.axes import feature_axes, feature_shape
from bn_jax.core.batch_norm import batch_norm_noticing
from bn_jax.core.moments import measure
from bn_jax.core.normalize import BatchNormParams, normalize
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
    collection `batch_stats` (`mean`, `var`) towards μ and σ²; it must be mutable in `apply`.
    Evaluation normalizes by the collection. The parameters γ and β are `scale` and `bias`.

    Differs from flax.linen.BatchNorm in

    - accuracy: a mean that is large against the spread costs no digits, whatever
      `use_fast_variance` says;
    - masks: what is masked out may hold anything, NaN included, and spoils no gradient; float
      masks are weights; with `axis_name`, every member counts by its number of unmasked values;
    - the running statistics: an empty or fully masked batch, or a feature whose moments are not
      finite, leaves them as they were, and no gradient flows into them;
    - training with one value per feature, which warns (`bn_jax.layers.SingleValueWarning`) that y
      is `bias` and the running variance moves towards 0;
    - mixed dtypes, which also work where JAX's promotion is strict.

    Attributes:
        use_running_average: normalize by the running statistics (True: evaluation) or by the
            batch (False: training); given either here or in the call.
        axis: the feature axis, or several: all others are batch.
        momentum: the weight of the past in the running statistics, as in flax; torch's momentum
            is one minus this. May be an array or traced, of one value or one per feature.
        epsilon: added to the variance.
        dtype: of the result; None for the common dtype of x, scale and bias. Statistics are
            computed in float32 at least.
        param_dtype: of scale and bias.
        use_bias: learn β.
        use_scale: learn γ.
        bias_init: initializer of β.
        scale_init: initializer of γ.
        axis_name: pool the statistics over this named axis, or several, of vmap, shard_map or
            pmap. Under plain jit there is nothing to name: the batch is whole.
        axis_index_groups: pool within groups of that axis only, a partition of its indices. Works
            under vmap and shard_map too.
        use_fast_variance: no effect, accepted for flax's sake: there is one way to compute the
            variance, in one pass and without cancellation.
        force_float32_reductions: no effect, accepted for flax's sake: reductions and new
            `batch_stats` are float32 also if it is False, where flax's are in param_dtype.
        average: how much of the past the running statistics keep, count -> weight, e.g.
            `bn_jax.DebiasedEma(0.99)`, which is right from the first step on, or any optax
            schedule. It replaces momentum, and needs a third variable in `batch_stats`, `count`.
            Where a checkpoint has none, its statistics stand for 1000 batches. None is flax's
            average, `bn_jax.Ema(momentum)`, without that variable.
        unbiased: the running variance gets m/(m - 1), as in the paper and torch. False is flax.
        group_size: ghost batch norm: each group of this many examples, neighbours on the leading
            batch axis, is normalized by its own statistics; what is remembered are those of all
            groups together. None for the whole batch.

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

    # The fields that flax's class has not, or in a narrower type.
    axis: int | Sequence[int] = -1  # pyright: ignore[reportIncompatibleVariableOverride]
    axis_name: str | tuple[str, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    average: Average | None = None
    unbiased: bool = False
    group_size: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Array | np.ndarray,
        use_running_average: bool | None = None,
        *,
        mask: Array | np.ndarray | None = None,
    ) -> Array:
        """Normalize x by its own statistics (training) or by the running ones (evaluation).

        Initialization normalizes by the batch if it trains, be it a batch of one, but updates
        nothing and needs no `axis_name`.

        Args:
            x: any shape; integers are taken as float32.
            use_running_average: as in the constructor, if it was not given there.
            mask: which values count in the batch's statistics: True counts; an integer k counts as
                k copies of the value; floats are importances, on any scale. Of x's shape, of x's
                shape without its feature axes, or broadcastable to either. At evaluation, it only
                tells what is padding.

        Returns:
            y, of x's shape; see `dtype`.

        Raises:
            TypeError: use_running_average is traced.
            ValueError: use_running_average is given twice or not at all; a variable does not fit
                x, or mask does not, or does in two ways; axis_index_groups do not hold each index
                of the axis once.
            NameError: axis_name is not bound here.
            flax.errors.ModifyScopeVariableError: training while `batch_stats` is not mutable.
        """
        evaluate = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        check_flag(evaluate)
        x = jnp.asarray(x)
        axes = feature_axes(x, self.axis)
        shape = feature_shape(x, axes)
        kind = mean_dtype(x.dtype, self.dtype, self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, kind)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        count = None
        if self.average is not None and (self.is_initializing() or not evaluate):
            count = self.variable("batch_stats", "count", jnp.zeros, shape, jnp.float32)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        params = BatchNormParams(scale, bias)
        x, result = promote(x, params, self.dtype)
        where = read_mask(mask, x, axes)

        if self.is_initializing() and not evaluate:
            # Without averages and axis_name, and without a word about one value per feature.
            batch = measure(x, feature_axis=axes, where=where)
            options = {"epsilon": self.epsilon, "feature_axis": axes, "where": where}
            return normalize(x, batch.mean, batch.var, params, **options).astype(result)

        seen = batches_seen(None if count is None else count.value, mean.value)
        y, state = batch_norm_noticing(
            warn,
            x,
            params,
            BatchNormState(mean.value, var.value, seen),
            train=not evaluate,
            average=flax_average(self.momentum) if self.average is None else self.average,
            epsilon=self.epsilon,
            feature_axis=axes,
            where=where,
            unbiased=self.unbiased,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            group_size=self.group_size,
        )
        if not evaluate:
            mean.value, var.value = state.mean, state.var
            if count is not None:
                count.value = state.count
        return y.astype(result)
