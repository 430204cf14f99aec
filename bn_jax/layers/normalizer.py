"""Which function of the core a layer calls, by its settings."""

from collections.abc import Callable
from functools import partial
from typing import Any

from bn_jax.core.batch_norm import batch_norm
from bn_jax.core.renorm import batch_renorm


def choose_normalizer(
    renorm: tuple[Any, Any] | None, unbiased: bool, group_size: int | None
) -> Callable[..., Any]:
    """`batch_norm`, or with limits of a correction `batch_renorm`.

    Raises:
        ValueError: renorm is no pair, or comes with unbiased.

    >>> choose_normalizer((3.0, 5.0), False, None).keywords
    {'group_size': None, 'r_max': 3.0, 'd_max': 5.0}
    """
    if renorm is None:
        return partial(batch_norm, group_size=group_size, unbiased=unbiased)
    if unbiased:
        raise ValueError(
            f"renorm averages standard deviations as they are, so unbiased={unbiased} has no "
            "meaning for it; leave unbiased out"
        )
    if not isinstance(renorm, tuple | list) or len(renorm) != 2:
        raise ValueError(f"renorm={renorm!r} must be a pair (r_max, d_max), e.g. (3.0, 5.0)")
    return partial(batch_renorm, group_size=group_size, r_max=renorm[0], d_max=renorm[1])
