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

from bn_jax.core.averages import Average
from bn_jax.core.layout import read_layout
from bn_jax.core.normalize import BatchNormParams
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


class BatchNorm(nnx.BatchNorm):
    """Batch normalization with flax.nnx's constructor, variables and call.

    Training (`train()`, or use_running_average=False) normalizes each feature by the batch,
    y = γ (x - μ)/√(σ² + ε) + β, and moves `mean` and `var` (`nnx.BatchStat`) towards μ and σ².
    Evaluation (`eval()`, or use_running_average=True) normalizes by `mean` and `var`. The
    parameters γ and β are `scale` and `bias` (`nnx.Param`, or None).

    A call in training writes to the module. nnx's transforms (nnx.jit, nnx.grad, nnx.vmap,
    nnx.scan, nnx.remat) carry the new statistics out. JAX's own transforms cannot write to a
    module from outside. There, split the module outside,
    `graph, params, rest = nnx.split(model, nnx.Param, ...)`, merge it inside,
    `model = nnx.merge(graph, params, rest, copy=True)`, and return
    `nnx.state(model, nnx.BatchStat)`, which `nnx.update` stores outside.

    Under nnx.vmap, a layer that all members share has one set of statistics: pool them by giving
    the same axis_name here and to nnx.vmap. For statistics per member, give them an axis, both
    where the layer is made and where it is called:
    in_axes=(nnx.StateAxes({nnx.BatchStat: 0, ...: None}), 0). Without either, JAX refuses the
    batched output.

    Differs from flax.nnx.BatchNorm in

    - accuracy: no digits are lost where the mean is large compared with the standard deviation,
      whatever `use_fast_variance` says;
    - evaluation with a half-precision `dtype`: mean and var are not rounded to it;
    - masks: masked-out values may be anything, NaN included, without harm to the gradients; a
      float mask holds weights; with `axis_name`, each device counts by its unmasked values;
    - the running statistics: an empty or fully masked batch, or a feature whose moments are not
      finite, leaves them unchanged, and no gradient flows into them;
    - training with one value per feature: y is `bias`, the running variance moves towards 0, and
      `bn_jax.layers.SingleValueWarning` says so;
    - several feature axes: `num_features` must be their shape;
    - mixed dtypes: they work under JAX's strict promotion too.

    Args:
        num_features: how many features; a shape if there are several feature axes.
        use_running_average: as in flax: True normalizes by the running statistics (evaluation),
            False by the batch (training). The call's argument, if given, overrides it.
        axis: as in flax: the feature axis, or several. All other axes are batch axes.
        momentum: as in flax: the weight of the past in the running statistics. torch's momentum is
            one minus this. May be an array, a variable or traced, with one value or one per
            feature.
        epsilon, param_dtype, use_bias, use_scale, bias_init, scale_init: as in flax.
        dtype: of the result. None takes the common dtype of x, mean, var, scale and bias. As in
            flax, x is rounded to it first; the statistics are then computed in at least float32.
        axis_name: as in flax: pool the statistics over this named axis, or several. Under plain
            `jit` it is not needed, because the statistics are those of the whole batch anyway.
        axis_index_groups: as in flax: pool within these groups of the axis's indices. Also works
            under `vmap` and `shard_map`.
        use_fast_variance: accepted for compatibility, without effect. The variance is computed in
            one pass without cancellation.
        promote_dtype: as in flax: a function of (x, mean, var, scale, bias) and dtype that returns
            them in a common dtype. The mean and var that it returns are not used.
        rngs, bias_metadata, scale_metadata: as in flax.
        average: the moving average, a function from the number of batches seen to the weight of
            the past: `bn_jax.DebiasedEma(0.99)`, which is right from the first step, or an optax
            schedule. It replaces `momentum` and adds the variable `count` (`nnx.BatchStat`), also
            if it is set later, such as by `set_attributes`. Statistics that were learned without a
            `count`, or loaded, weigh as much as 1000 batches. None is flax's average,
            `bn_jax.Ema(momentum)`, without `count`.
        unbiased: multiply the running variance by m/(m - 1), as the paper and torch do. False is
            flax's behaviour.
        group_size: ghost batch norm: every group of this many neighbouring examples on the leading
            batch axis is normalized by its own statistics. The running statistics take all groups
            together. None normalizes the whole batch.
        renorm: Batch Renormalization by the limits (r_max, d_max), such as (3.0, 5.0); see
            `bn_jax.batch_renorm`. A limit may be a schedule of the number of batches, for which
            `average` is needed. Not with `unbiased`. None is batch norm.

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
        renorm: tuple[Any, Any] | None = None,
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
        self.renorm = renorm

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; setting `average` also creates the variable `count` that it needs."""
        super().__setattr__(name, value)
        if name == "average" and value is not None and getattr(self, "count", value) is None:
            self.count = nnx.BatchStat(jnp.zeros_like(self.mean[...], jnp.float32))

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

        Args:
            x: any shape; integers are converted to floats.
            use_running_average: overrides the constructor's.
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
            ValueError: use_running_average is given nowhere; the shape of a variable does not fit
                x; the shape of mask does not fit x, or fits in two ways; scale or bias does not
                fit x, or the layer has its own.
            NameError: axis_name is not bound.
            flax.errors.TraceContextError: a training step inside one of JAX's own transforms, with
                a module from outside.
        """
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None:
            raise ValueError(
                "use_running_average is given neither to BatchNorm nor to its call; pass it to "
                "either, or set it with train(), eval() or nnx.view"
            )
        check_flag(evaluate)
        x = jnp.asarray(x)
        axes = read_layout(x, self.axis).axes
        mean, var = self.mean[...], self.var[...]
        own = (None if part is None else part[...] for part in (self.scale, self.bias))
        scale, bias = own_or_given(BatchNormParams(*own), (scale, bias))
        with jax.numpy_dtype_promotion("standard"):
            x, _, _, scale, bias = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
        params = BatchNormParams(scale, bias)
        x, result = promote(x, params, self.dtype)
        params, outside = split_affine(params, x, axes)
        seen = batches_seen(None if self.count is None else self.count[...], mean)
        momentum = self.momentum[...] if isinstance(self.momentum, nnx.Variable) else self.momentum
        normalizer = choose_normalizer(self.renorm, self.unbiased, self.group_size)
        with on_single_value(warn):
            y, state = normalizer(
                x,
                params,
                BatchNormState(mean, var, seen),
                train=not evaluate,
                average=flax_average(momentum) if self.average is None else self.average,
                epsilon=self.epsilon,
                feature_axis=axes,
                where=read_mask(mask, x, axes),
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
            )
        if not evaluate:
            remember(self.mean, state.mean)
            remember(self.var, state.var)
            if self.count is not None:
                remember(self.count, state.count)
        return apply_affine(y, outside).astype(result)


def remember(variable: nnx.BatchStat[Array], value: Array) -> None:
    """Store a new value; plain `variable[...] = value` would round it to the old dtype."""
    if variable[...].dtype == value.dtype:
        variable[...] = value
    else:
        variable.set_value(value)
