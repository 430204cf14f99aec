"""Training on one value per feature: noticed when values are computed, not when shapes are traced.

The variance of one value is zero whatever the value is, so that y is β. `batch_norm` refuses it;
the Flax layers warn and go on. Neither may happen where only shapes are asked for
(`jax.eval_shape`, `jax.make_jaxpr`, a model summary that is shown one example): these often give
a batch of one. While JAX traces, nothing public tells `eval_shape` from `jit`. So the notice is the
lowering rule of an identity: JAX lowers what it compiles, and only that.
"""

from collections.abc import Callable
from typing import NoReturn

from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

Notice = Callable[[str], None]
"""What to do about training on one value per feature, given what is wrong and what helps."""


def refuse(message: str) -> NoReturn:
    """Raise ValueError, as the functional core does."""
    raise ValueError(message)


def ignore(message: str) -> None:
    """Do nothing, as an initialization does."""


def when_computed(notice: Notice, message: str, x: Array) -> Array:
    """X; notice(message) is called when it is computed, op by op or compiled."""
    return notice_p.bind(x, notice=notice, message=message)


def compute(x: ArrayLike, *, notice: Notice, message: str) -> ArrayLike:
    """X, op by op."""
    notice(message)
    return x


def lower(context, x, *, notice, message):
    """X, where it is compiled."""
    notice(message)
    return [x]


notice_p = Primitive("notice_single_value")
notice_p.def_impl(compute)
notice_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(notice_p, lower)
ad.primitive_jvps[notice_p] = lambda primals, tangents, **options: (
    notice_p.bind(*primals, **options),
    tangents[0],
)
batching.primitive_batchers[notice_p] = lambda values, dims, **options: (
    notice_p.bind(*values, **options),
    dims[0],
)
