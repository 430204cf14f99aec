"""`BatchNorm` for Equinox: under vmap as equinox.nn.BatchNorm, or on a whole batch.

>>> from bn_jax.layers.equinox import BatchNorm   # instead of: from equinox.nn import BatchNorm
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from equinox.nn import State, StatefulLayer, StateIndex
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import bn_jax as bn
from bn_jax.core.layout import read_layout
from bn_jax.layers.affine import apply_affine, own_or_given, split_affine
from bn_jax.layers.normalizer import choose_normalizer

WITHOUT: dict[str, str] = dict.fromkeys(("weight", "bias"), "channelwise_affine=False")


class BatchNorm(StatefulLayer):
    """Batch normalization whose running statistics live in an `equinox.nn.State`.

    Training normalizes each feature by the batch, y = γ (x - μ)/√(σ² + ε) + β, and moves the
    statistics in the state towards μ and σ². Inference normalizes by the state. γ and β are
    `weight` and `bias`. Make a layer with `equinox.nn.make_with_state(BatchNorm)(...)`.

    The batch consists of all axes of x except the feature axes, and of the named axis of vmap,
    shard_map or pmap, if there is one:

    - for single examples under vmap, name the axis: BatchNorm(8, "batch"), called as
      jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None));
    - for a whole batch, no name is needed: BatchNorm(8, axis=1) takes [batch, 8, ...], and
      BatchNorm(8, axis=-1) takes [batch, 8].

    Differs from equinox.nn.BatchNorm in

    - training: it normalizes by the batch, like equinox's mode="batch";
    - the running statistics: they are right from the first batch (`bn_jax.DebiasedEma`), and an
      empty batch, or one that is not finite, leaves them unchanged;
    - accuracy, also in half precision: the statistics are at least float32;
    - axis names: they are optional and static, so trees of layers hold no strings;
    - masks, weights, ghost batch norm and Batch Renormalization, which equinox lacks.

    Args:
        input_size: how many features; a shape if there are several feature axes.
        axis_name: pool the statistics over this named axis, or several.
        eps: ε, added to the variance.
        channelwise_affine: learn γ and β.
        momentum: the weight of the past in the running statistics.
        inference: normalize by the state. `equinox.nn.inference_mode` and the call's argument
            override it.
        dtype: of weight and bias.
        axis: the feature axis of x, or several.
        average: another moving average, in place of DebiasedEma(momentum): a function from the
            number of batches seen to the weight of the past.
        unbiased: multiply the running variance by m/(m - 1), as in the paper of batch norm. None
            is True, and False with `renorm`, whose paper does not.
        group_size: ghost batch norm, as in `bn_jax.batch_norm`.
        renorm: Batch Renormalization by the limits (r_max, d_max), such as (3.0, 5.0), numbers or
            schedules of the number of batches; see `bn_jax.batch_renorm`.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (8, 3)) * 5 + 2
    >>> layer, state = eqx.nn.make_with_state(BatchNorm)(3, "batch")
    >>> members = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
    >>> y, state = jax.vmap(layer, **members)(x, state)
    >>> evaluated, _ = jax.vmap(eqx.nn.inference_mode(layer), **members)(x, state)
    >>> bool(jnp.allclose(y, evaluated, atol=0.2))   # the running variance is unbiased: 8/7 σ²
    True
    """

    weight: Array | None
    bias: Array | None
    state_index: StateIndex[bn.BatchNormState]
    inference: bool
    axis_name: str | tuple[str, ...] | None = eqx.field(static=True)
    axis: int | tuple[int, ...] = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    average: Callable[[Array], ArrayLike] = eqx.field(static=True)
    unbiased: bool = eqx.field(static=True)
    group_size: int | None = eqx.field(static=True)
    renorm: tuple[Any, Any] | None = eqx.field(static=True)

    def __init__(
        self,
        input_size: int | Sequence[int],
        axis_name: str | Sequence[str] | None = None,
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype: DTypeLike = jnp.float32,
        *,
        axis: int | Sequence[int] = 0,
        average: Callable[[Array], ArrayLike] | None = None,
        unbiased: bool | None = None,
        group_size: int | None = None,
        renorm: tuple[Any, Any] | None = None,
    ):
        affine = {"use_scale": channelwise_affine, "use_bias": channelwise_affine}
        (self.weight, self.bias), state = bn.init(input_size, **affine, dtype=dtype)
        self.state_index = StateIndex(state)
        self.inference = inference
        if axis_name is None or isinstance(axis_name, str):
            self.axis_name = axis_name
        else:
            self.axis_name = tuple(axis_name)
        self.axis = axis if isinstance(axis, int) else tuple(axis)
        self.eps = eps
        self.average = bn.DebiasedEma(momentum) if average is None else average
        self.unbiased = renorm is None if unbiased is None else unbiased
        self.group_size = group_size
        self.renorm = renorm

    def __call__(
        self,
        x: Array | np.ndarray,
        state: State,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        mask: Array | np.ndarray | None = None,
        weight: Array | np.ndarray | None = None,
        bias: Array | np.ndarray | None = None,
    ) -> tuple[Array, State]:
        """Normalize x by its own statistics (training) or by the running ones (inference).

        Args:
            x: has its features on `axis`; all other axes are batch axes.
            state: the model's state.
            key: not used; `equinox.nn.Sequential` passes it.
            inference: overrides the layer's.
            mask: which values the batch's statistics are computed over, as `where` in
                `bn_jax.batch_norm`: a mask, integer counts or float weights.
            weight: γ of this call, as in conditional batch norm and FiLM; make the layer with
                channelwise_affine=False. One per feature, or, on a whole batch, one row of that
                per example, or of x's rank and broadcastable to x.
            bias: β of this call, likewise.

        Returns:
            (y, state), where y has x's shape and dtype.

        Raises:
            NameError: axis_name is not bound.
            ValueError: training with one value per feature; weight or bias does not fit x, or the
                layer has its own.
        """
        x = jnp.asarray(x)
        own = bn.BatchNormParams(self.weight, self.bias)
        params = own_or_given(own, (weight, bias), WITHOUT)
        params, outside = split_affine(params, x, read_layout(x, self.axis).axes)
        train = not (self.inference if inference is None else inference)
        normalizer = choose_normalizer(self.renorm, self.unbiased, self.group_size)
        y, moved = normalizer(
            x,
            params,
            state.get(self.state_index),
            train=train,
            average=self.average,
            epsilon=self.eps,
            feature_axis=self.axis,
            where=mask,
            axis_name=self.axis_name,
        )
        y = apply_affine(y, outside)
        return y, state.set(self.state_index, moved) if train else state
