"""A notice that is given when values are computed or compiled, not when only shapes are traced.

Behaviour: while JAX traces, nothing public tells `jax.eval_shape` from `jax.jit`. A primitive's
lowering rule runs only for what is compiled.
Seen on: jax 0.8.2 to 0.12.
Cost without: training on one value per feature is refused where only shapes are asked for, too, as
by a model summary with one example.
Canary: none. JAX would need a new public function.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NoReturn

from jax import Array

from bn_jax.core.xla.primitives import operation

Notice = Callable[[str], None]
"""What to do about training on one value per feature, given what is wrong and what helps."""


def refuse(message: str) -> NoReturn:
    """Raise ValueError."""
    raise ValueError(message)


current: ContextVar[Notice] = ContextVar("current", default=refuse)


@contextlib.contextmanager
def on_single_value(notice: Notice) -> Iterator[None]:
    """Within this context, training on one value per feature calls notice and does not raise."""
    token = current.set(notice)
    try:
        yield
    finally:
        current.reset(token)


def notice_when_computed(message: str, x: Array) -> Array:
    """X; the current notice gets the message when x is computed or compiled."""
    return bind_notice(x, notice=current.get(), message=message)[0]


def unchanged(x, **_):
    """Return x."""
    return [x]


def give_notice(x, *, notice, message, alone):
    """Return x, after the notice."""
    del alone
    notice(message)
    return [x]


bind_notice = operation(
    "notice_single_value",
    unchanged,
    unchanged,
    on={"all": give_notice},
    jvp=lambda operands, tangents, **options: (bind_notice(*operands, **options), tangents),
)
