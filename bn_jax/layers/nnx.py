"""`BatchNorm` for flax.nnx: change the import, and keep model, checkpoints and training loop.

>>> from bn_jax.layers.nnx import BatchNorm   # instead of: from flax.nnx import BatchNorm
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as promote_together
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax import Array
from jax.nn import initializers

from bn_jax.core.averages import Average, BatchNormState
from bn_jax.core.axes import feature_axes
from bn_jax.core.batch_norm import batch_norm_noticing
from bn_jax.core.normalize import BatchNormParams
from bn_jax.layers.single_value import warn
from bn_jax.layers.translate import (
    batches_seen,
    check_flag,
    flax_average,
    mean_dtype,
    promote,
    read_mask,
)


class BatchNorm(nnx.BatchNorm):
    """Batch normalization with flax.nnx's constructor, variables and call.

    Training (`train()`, or use_running_average=False) normalizes each feature by the batch,
    y = γ (x - μ)/√(σ² + ε) + β, and moves `mean` and `var` (`nnx.BatchStat`) towards μ and σ².
    Evaluation (`eval()`, or use_running_average=True) normalizes by `mean` and `var`. The
    parameters γ and β are `scale` and `bias` (`nnx.Param`, or None).

    A call in training writes to the module, so go through nnx's transforms (nnx.jit, nnx.grad,
    nnx.vmap, nnx.scan, nnx.remat), which carry the new statistics out. Inside of JAX's own, a
    module from outside cannot be written to. Take it apart outside,
    `graph, params, rest = nnx.split(model, nnx.Param, ...)`; put it together inside,
    `model = nnx.merge(graph, params, rest, copy=True)`; and return
    `nnx.state(model, nnx.BatchStat)`, for `nnx.update` outside.

    Under nnx.vmap, a layer that all members share has one set of statistics: pool them, with
    axis_name here and in nnx.vmap. For statistics of each member's own, give them an axis, here as
    where the layer is made: in_axes=(nnx.StateAxes({nnx.BatchStat: 0, ...: None}), 0). Without
    either, JAX refuses the batched output.

    Differs from flax.nnx.BatchNorm in

    - accuracy: a mean that is large against the spread costs no digits, whatever
      `use_fast_variance` says;
    - evaluation with a half-precision `dtype`, for which mean and var are not rounded;
    - masks: what is masked out may hold anything, NaN included, and spoils no gradient; floats
      are weights; with `axis_name`, every member counts by its number of unmasked values;
    - the running statistics: an empty or fully masked batch, or a feature whose moments are not
      finite, leaves them as they were, and no gradient flows into them;
    - training with one value per feature, which warns (`bn_jax.layers.SingleValueWarning`) that y
      is `bias` and the running variance moves towards 0;
    - several feature axes, which need their sizes in `num_features`;
    - mixed dtypes, which also work where JAX's promotion is strict.

    Args:
        num_features: how many features, or a shape if axis names several axes.
        use_running_average: normalize by the running statistics (True: evaluation) or by the
            batch (False: training). The call's argument, if given, goes before this.
        axis: the feature axis, or several: all others are batch.
        momentum: the weight of the past in the running statistics, as in flax; torch's momentum
            is one minus this. May be an array, a variable or traced, of one value or one per
            feature.
        epsilon: added to the variance.
        dtype: of the result; None for the common dtype of x, mean, var, scale and bias.
            Statistics are computed in float32 at least, but of x rounded to dtype, as in flax.
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
        promote_dtype: (x, mean, var, scale, bias), dtype -> the same in a common dtype. What it
            makes of mean and var is not used.
        rngs: for the initializers.
        bias_metadata: of the variable bias.
        scale_metadata: of the variable scale.
        average: how much of the past the running statistics keep, count -> weight, e.g.
            `bn_jax.DebiasedEma(0.99)`, which is right from the first step on, or any optax
            schedule. It replaces momentum, and needs a third `nnx.BatchStat`, `count`, which it
            gets also if it is set later, e.g. by `set_attributes`. None is flax's average,
            `bn_jax.Ema(momentum)`, without that variable. Statistics that were learned without a
            count, or loaded, stand for 1000 batches.
        unbiased: the running variance gets m/(m - 1), as in the paper and torch. False is flax.
        group_size: ghost batch norm: each group of this many examples, neighbours on the leading
            batch axis, is normalized by its own statistics; what is remembered are those of all
            groups together. None for the whole batch.

    >>> import jax
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (8, 3)) * 5 + 2
    >>> layer = BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    >>> y = layer(x)              # normalizes by the batch, and remembers it
    >>> layer.eval()
    >>> y = layer(x[:1])          # normalizes by what was remembered
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | tuple[int, ...] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: str | tuple[str, ...] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_together,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        average: Average | None = None,
        unbiased: bool = False,
        group_size: int | None = None,
    ):
        shape = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)
        self.mean = nnx.BatchStat(jnp.zeros(shape, mean_dtype(dtype, param_dtype)))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))
        self.count = nnx.data(None)
        self.scale = (
            nnx.Param(scale_init(rngs.params(), shape, param_dtype), **scale_metadata)
            if use_scale
            else nnx.data(None)
        )
        self.bias = (
            nnx.Param(bias_init(rngs.params(), shape, param_dtype), **bias_metadata)
            if use_bias
            else nnx.data(None)
        )
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.average = average
        self.unbiased = unbiased
        self.group_size = group_size

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; an average, also a later one, gets the count it needs."""
        super().__setattr__(name, value)
        if name == "average" and value is not None and getattr(self, "count", value) is None:
            self.count = nnx.BatchStat(jnp.zeros_like(self.mean[...], jnp.float32))

    def __call__(
        self,
        x: Array | np.ndarray,
        use_running_average: bool | None = None,
        *,
        mask: Array | np.ndarray | None = None,
    ) -> Array:
        """Normalize x by its own statistics (training) or by the running ones (evaluation).

        Args:
            x: any shape; integers are taken as floats.
            use_running_average: goes before the constructor's.
            mask: which values count in the batch's statistics: True counts; an integer k counts as
                k copies of the value; floats are importances, on any scale. Of x's shape, of x's
                shape without its feature axes, or broadcastable to either. At evaluation, it only
                tells what is padding.

        Returns:
            y, of x's shape; see `dtype`.

        Raises:
            TypeError: use_running_average is traced.
            ValueError: use_running_average is given nowhere; a variable does not fit x, or mask
                does not, or does in two ways.
            NameError: axis_name is not bound here.
            flax.errors.TraceContextError: training inside of one of JAX's own transforms, while
                the module is from outside.
        """
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None:
            raise ValueError(
                "use_running_average is given neither to BatchNorm nor to its call; pass it to "
                "either, or set it with train(), eval() or nnx.view"
            )
        check_flag(evaluate)
        x = jnp.asarray(x)
        axes = feature_axes(x, self.axis)
        mean, var = self.mean[...], self.var[...]
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        with jax.numpy_dtype_promotion("standard"):
            x, _, _, scale, bias = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
        params = BatchNormParams(scale, bias)
        x, result = promote(x, params, self.dtype)
        seen = batches_seen(None if self.count is None else self.count[...], mean)
        momentum = self.momentum[...] if isinstance(self.momentum, nnx.Variable) else self.momentum
        y, state = batch_norm_noticing(
            warn,
            x,
            params,
            BatchNormState(mean, var, seen),
            train=not evaluate,
            average=flax_average(momentum) if self.average is None else self.average,
            epsilon=self.epsilon,
            feature_axis=axes,
            where=read_mask(mask, x, axes),
            unbiased=self.unbiased,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            group_size=self.group_size,
        )
        if not evaluate:
            remember(self.mean, state.mean)
            remember(self.var, state.var)
            if self.count is not None:
                remember(self.count, state.count)
        return y.astype(result)


def remember(variable: nnx.BatchStat[Array], value: Array) -> None:
    """Give a variable its new value; `[...]` would round a wider one to the dtype of the old."""
    if variable[...].dtype == value.dtype:
        variable[...] = value
    else:
        variable.set_value(value)
