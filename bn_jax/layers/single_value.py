"""The warning of the Flax layers when they train on one value per feature."""

import sys
import warnings

LIBRARIES = (
    "bn_jax.core.",
    "bn_jax.layers.",
    "flax.",
    "jax.",
    "jaxtyping.",
    "beartype.",
    "contextlib.",
)
"""Modules whose frames lie between a user's line and the warning."""


class SingleValueWarning(UserWarning):
    """A layer trains on one value per feature: y is β, and the running variance moves towards 0.

    Flax computes the same without a warning; `bn_jax.batch_norm` raises ValueError. To get an error
    from the layers too:

    >>> warnings.simplefilter("error", SingleValueWarning)

    By default, Python shows the warning once for each shape and line:

    >>> warnings.simplefilter("default", SingleValueWarning)
    """


def warn(message: str) -> None:
    """Warn in Flax's words, at the line outside of JAX, Flax and this package that led here."""
    message = message.replace("train=False", "use_running_average=True")
    warnings.warn(message, SingleValueWarning, stacklevel=1 + caller_level())


def caller_level() -> int:
    """How many calls up from the function that asks the first line outside of LIBRARIES is."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level
