"""What the Flax layers say when they train on one value per feature."""

import warnings


class SingleValueWarning(UserWarning):
    """A layer trains on one value per feature: y is β, and the running variance moves towards 0.

    Flax computes the same and says nothing; `bn_jax.batch_norm` raises ValueError. To make it an
    error in the layers too:

    >>> warnings.simplefilter("error", SingleValueWarning)
    >>> warnings.simplefilter("default", SingleValueWarning)   # once for each shape, as at first
    """


def warn(message: str) -> None:
    """Warn, in Flax's words."""
    message = message.replace("train=False", "use_running_average=True")
    warnings.warn(message, SingleValueWarning, stacklevel=1)
