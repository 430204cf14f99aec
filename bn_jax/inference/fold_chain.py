"""Which batch norms of a chain of layers can be folded, into which neighbour, and why not.

Three examples: in Conv, BatchNorm, relu the batch norm is folded into the Conv before it; in relu,
BatchNorm, Dense into the Dense after it; in relu, BatchNorm, Conv it stays. linen's and nnx's
layers are treated alike, because they have the same attributes. Nothing is changed in place.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.core.normalize import BatchNormParams
from bn_jax.core.state import BatchNormState
from bn_jax.inference.fold import (
    fold_conv,
    fold_conv_transpose,
    fold_dense,
    fold_into_following_dense,
)

BATCH_NORMS = (
    nn.BatchNorm,
    nnx.BatchNorm,
    bn_jax.layers.linen.BatchNorm,
    bn_jax.layers.nnx.BatchNorm,
)
DENSE = (nn.Dense, nnx.Linear)
TRANSPOSED = (nn.ConvTranspose, nnx.ConvTranspose)
LINEAR = (*DENSE, *TRANSPOSED, nn.Conv, nnx.Conv)
REPLACEABLE = (
    "conv_general_dilated",
    "conv_general_dilated_cls",
    "dot_general",
    "dot_general_cls",
    "preferred_element_type",
    "promote_dtype",
)
"""Attributes that may turn a layer into another function; a layer that sets one is not folded."""


class ChainLayer(NamedTuple):
    """A layer in a chain of layers.

    Attributes:
        name: its path in the model.
        module: the layer itself, or any other callable.
        values: its parameters and statistics, by flax's names; empty if they are not needed.
        uses: in how many places of the model the layer, or one of its parameters, is used.
        affine_in_call: whether it gets scale or bias in its call.

    >>> str(ChainLayer("layers_0", nn.Dense(3), {}))
    'layers_0 Dense'
    """

    name: str
    module: Any
    values: Mapping[str, Array]
    uses: int = 1
    affine_in_call: bool = False

    def __str__(self) -> str:
        kind = getattr(self.module, "__name__", type(self.module).__name__)
        return f"{self.name} {kind}"


class FoldResult(NamedTuple):
    """What was done with one batch norm.

    Attributes:
        batch_norm: its path and class.
        into: path and class of the layer that it was folded into, or None.
        why_not: why it was not folded, or None.

    >>> print(FoldResult("norm BatchNorm", "conv Conv", None))
    norm BatchNorm: folded into conv Conv
    """

    batch_norm: str
    into: str | None
    why_not: str | None

    def __str__(self) -> str:
        done = f"folded into {self.into}" if self.into else f"stays: {self.why_not}"
        return f"{self.batch_norm}: {done}"


class FoldReport(tuple[FoldResult, ...]):
    """A `FoldResult` for every batch norm of a model, in order; prints as one line for each.

    >>> report = FoldReport([FoldResult("norm BatchNorm", None, "is the first layer")])
    >>> print(report)
    norm BatchNorm: stays: is the first layer
    >>> len(report.stays)
    1
    """

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no batch norm"

    @property
    def stays(self) -> "FoldReport":
        """The batch norms that were not folded."""
        return FoldReport(result for result in self if result.into is None)


class FoldedChain(NamedTuple):
    """A chain after folding.

    Attributes:
        values: new parameters of linear layers, by position.
        gone: positions of the batch norms that were folded.
        results: one for every batch norm, in order.

    >>> fold_chain([ChainLayer("norm", nn.BatchNorm(), {})]).results[0].why_not
    'is the first layer, is the last layer'
    """

    values: dict[int, dict[str, Array]]
    gone: set[int]
    results: list[FoldResult]


def fold_chain(chain: Sequence[ChainLayer]) -> FoldedChain:
    """Fold every batch norm into the layer before it, or if that is impossible, the one after it.

    A folded batch norm leaves the chain, so two in a row can both be folded into one layer.
    """
    remaining = dict(enumerate(chain))
    result = FoldedChain({}, set(), [])
    for n, norm in enumerate(chain):
        if type(norm.module) not in BATCH_NORMS:
            continue
        before = max((m for m in remaining if m < n), default=-1)
        after = min((m for m in remaining if m > n), default=len(chain))
        into, why_not = None, reason_itself(norm)
        if why_not is None:
            reasons = (
                reason_before(norm, remaining.get(before)),
                reason_after(norm, remaining.get(after)),
            )
            into = before if reasons[0] is None else after if reasons[1] is None else None
            why_not = None if into is not None else ", ".join(map(str, reasons))
        if into is not None:
            result.values[into] = fold_values(norm, remaining[into], follows=into == before)
            remaining[into] = remaining[into]._replace(values=result.values[into])
            del remaining[n]
            result.gone.add(n)
        target = None if into is None else str(chain[into])
        result.results.append(FoldResult(str(norm), target, why_not))
    return result


def fold_values(norm: ChainLayer, neighbour: ChainLayer, *, follows: bool) -> dict[str, Array]:
    """Kernel and bias of a linear layer after a batch norm is folded into it."""
    fold: Callable[..., tuple[Array, Array]] = fold_conv
    if type(neighbour.module) in DENSE:
        fold = fold_dense if follows else fold_into_following_dense
    elif type(neighbour.module) in TRANSPOSED:
        fold = functools.partial(
            fold_conv_transpose, transpose_kernel=neighbour.module.transpose_kernel
        )
    mean, var = norm.values["mean"], norm.values["var"]
    params = BatchNormParams(norm.values.get("scale"), norm.values.get("bias"))
    state = BatchNormState(mean, var, jnp.zeros(jnp.shape(mean), jnp.int32))
    kernel, bias = fold(
        neighbour.values["kernel"],
        neighbour.values.get("bias"),
        params,
        state,
        epsilon=norm.module.epsilon,
    )
    return {"kernel": kernel, "bias": bias}


# Reasons not to fold; None if there is none.


def reason_itself(norm: ChainLayer) -> str | None:
    """Why the batch norm cannot be folded at all."""
    if norm.uses > 1:
        return f"is used {norm.uses} times"
    if norm.affine_in_call:
        return "gets scale or bias in its call"
    if norm.module.axis not in (-1, (-1,), [-1]):
        return f"has axis={norm.module.axis}, but the layers beside it have their features on -1"
    return None


def reason_before(norm: ChainLayer, neighbour: ChainLayer | None) -> str | None:
    """Why the batch norm cannot be folded into the layer before it."""
    if neighbour is None:
        return "is the first layer"
    if type(neighbour.module) not in LINEAR:
        return f"follows {neighbour}"
    if (reason := reason_of_layer(neighbour)) is not None:
        return reason
    dtype = dtype_of(neighbour)
    if dtype_of(norm, dtype) != dtype:
        return f"follows {neighbour} in {dtype}, but returns {dtype_of(norm, dtype)}"
    return None


def reason_after(norm: ChainLayer, neighbour: ChainLayer | None) -> str | None:
    """Why the batch norm cannot be folded into the layer after it."""
    if neighbour is None:
        return "is the last layer"
    if type(neighbour.module) not in DENSE:
        return f"precedes {neighbour}"
    if (reason := reason_of_layer(neighbour)) is not None:
        return reason
    dtype = dtype_of(neighbour)
    if jnp.finfo(dtype).bits < 32:
        return f"precedes {neighbour} in {dtype}, too few digits for an input that is not centered"
    if dtype_of(neighbour, dtype_of(norm, dtype)) != dtype:
        return f"precedes {neighbour} in {dtype}, but returns {dtype_of(norm, dtype)}"
    return None


def reason_of_layer(neighbour: ChainLayer) -> str | None:
    """Why nothing can be folded into this linear layer."""
    if neighbour.uses > 1:
        return f"{neighbour}, or a parameter of it, is used {neighbour.uses} times"
    defaults = inspect.signature(type(neighbour.module).__init__).parameters
    for name in REPLACEABLE:
        if name in defaults and getattr(neighbour.module, name) is not defaults[name].default:
            return f"{neighbour} sets {name}"
    return None


def dtype_of(layer: ChainLayer, x: DTypeLike | None = None) -> jnp.dtype:
    """The dtype of a layer's result by flax's rule, for an x of dtype x or of its parameters'."""
    if layer.module.dtype is not None:
        return jnp.dtype(layer.module.dtype)
    dtypes = [value.dtype for value in layer.values.values()] + ([] if x is None else [x])
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)
