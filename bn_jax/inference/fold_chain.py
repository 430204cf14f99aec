"""Which batch norms of a chain of layers can be folded, into which neighbour, and why not.

Three instances: Conv, BatchNorm, relu (into the Conv before it); relu, BatchNorm, Dense (into the
Dense after it); relu, BatchNorm, Conv (not at all). The layers are flax's, linen's or nnx's alike:
both describe themselves by the same attributes. Nothing is changed here.
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
from bn_jax.core.averages import BatchNormState
from bn_jax.core.normalize import BatchNormParams
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
"""Attributes by which a layer may become another map, or one of another dtype."""


class Link(NamedTuple):
    """A layer of a chain.

    Attributes:
        name: where it is in the model.
        layer: the module, or any other callable.
        values: its parameters and statistics, by flax's names; empty if they are not needed.
        uses: how many places of the model it, or one of its parameters, is used in.
    """

    name: str
    layer: Any
    values: Mapping[str, Array]
    uses: int = 1

    def __str__(self) -> str:
        kind = getattr(self.layer, "__name__", type(self.layer).__name__)
        return f"{self.name} {kind}"


class Fate(NamedTuple):
    """What became of a batch norm.

    Attributes:
        batch_norm: its name and class.
        into: the name and class of the layer it was folded into, or None.
        why_not: why it stays, or None.
    """

    batch_norm: str
    into: str | None
    why_not: str | None

    def __str__(self) -> str:
        done = f"folded into {self.into}" if self.into else f"stays: {self.why_not}"
        return f"{self.batch_norm}: {done}"


class Report(tuple[Fate, ...]):
    """What became of every batch norm of a model, in its order; prints as one line for each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no batch norm"

    @property
    def stays(self) -> "Report":
        """Those that were not folded."""
        return Report(fate for fate in self if fate.into is None)


class Folding(NamedTuple):
    """A folded chain, by positions: new values of its linear layers, what is gone, and why."""

    values: dict[int, dict[str, Array]]
    gone: set[int]
    fates: list[Fate]


def fold_chain(chain: Sequence[Link]) -> Folding:
    """Fold every batch norm into the layer before it, else into the one after it, else not.

    One that is gone is no neighbour any more: of two in a row after a layer, both are folded.
    """
    links = dict(enumerate(chain))
    result = Folding({}, set(), [])
    for n, norm in enumerate(chain):
        if type(norm.layer) not in BATCH_NORMS:
            continue
        before = max((m for m in links if m < n), default=-1)
        after = min((m for m in links if m > n), default=len(chain))
        into, why_not = None, reason_itself(norm)
        if why_not is None:
            reasons = reason_before(norm, links.get(before)), reason_after(norm, links.get(after))
            into = before if reasons[0] is None else after if reasons[1] is None else None
            why_not = None if into is not None else ", ".join(map(str, reasons))
        if into is not None:
            result.values[into] = fold_values(norm, links[into], follows=into == before)
            links[into] = links[into]._replace(values=result.values[into])
            del links[n]
            result.gone.add(n)
        target = None if into is None else str(chain[into])
        result.fates.append(Fate(str(norm), target, why_not))
    return result


def fold_values(norm: Link, link: Link, *, follows: bool) -> dict[str, Array]:
    """The kernel and bias of the linear layer that does the work of both."""
    fold: Callable[..., tuple[Array, Array]] = fold_conv
    if type(link.layer) in DENSE:
        fold = fold_dense if follows else fold_into_following_dense
    elif type(link.layer) in TRANSPOSED:
        fold = functools.partial(fold_conv_transpose, transpose_kernel=link.layer.transpose_kernel)
    mean, var = norm.values["mean"], norm.values["var"]
    params = BatchNormParams(norm.values.get("scale"), norm.values.get("bias"))
    state = BatchNormState(mean, var, jnp.zeros(jnp.shape(mean), jnp.int32))
    kernel, bias = fold(
        link.values["kernel"],
        link.values.get("bias"),
        params,
        state,
        epsilon=norm.layer.epsilon,
    )
    return {"kernel": kernel, "bias": bias}


# Reasons not to fold, or None.


def reason_itself(norm: Link) -> str | None:
    """What of the batch norm itself is in the way."""
    if norm.uses > 1:
        return f"is used {norm.uses} times"
    if norm.layer.axis not in (-1, (-1,), [-1]):
        return f"axis={norm.layer.axis} is not -1, where the layers beside it have features"
    return None


def reason_before(norm: Link, link: Link | None) -> str | None:
    """Why it cannot be folded into the layer before it."""
    if link is None:
        return "is the first layer"
    if type(link.layer) not in LINEAR:
        return f"follows {link}"
    if (reason := reason_of_layer(link)) is not None:
        return reason
    dtype = dtype_of(link)
    if dtype_of(norm, dtype) != dtype:
        return f"follows {link} in {dtype}, which it makes {dtype_of(norm, dtype)}"
    return None


def reason_after(norm: Link, link: Link | None) -> str | None:
    """Why it cannot be folded into the layer after it."""
    if link is None:
        return "is the last layer"
    if type(link.layer) not in DENSE:
        return f"precedes {link}"
    if (reason := reason_of_layer(link)) is not None:
        return reason
    dtype = dtype_of(link)
    if jnp.finfo(dtype).bits < 32:
        return f"precedes {link} in {dtype}, too coarse for what is not centered"
    if dtype_of(link, dtype_of(norm, dtype)) != dtype:
        return f"precedes {link} in {dtype}, which it makes {dtype_of(norm, dtype)}"
    return None


def reason_of_layer(link: Link) -> str | None:
    """Why a linear layer cannot be changed."""
    if link.uses > 1:
        return f"{link}, or a parameter of it, is used {link.uses} times"
    defaults = inspect.signature(type(link.layer).__init__).parameters
    for name in REPLACEABLE:
        if name in defaults and getattr(link.layer, name) is not defaults[name].default:
            return f"{link} has a {name} of its own"
    return None


def dtype_of(link: Link, x: DTypeLike | None = None) -> jnp.dtype:
    """The dtype of a layer's result by flax's rule, of an x that is no wider than its values."""
    if link.layer.dtype is not None:
        return jnp.dtype(link.layer.dtype)
    dtypes = [value.dtype for value in link.values.values()] + ([] if x is None else [x])
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)
