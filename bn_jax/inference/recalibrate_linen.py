"""`recalibrate_linen`: population statistics for the batch norms of a flax.linen model."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from bn_jax.core.moments import Moments
from bn_jax.core.population import check_estimator, conclude, include
from bn_jax.core.recalibrate import nothing, zeros
from bn_jax.inference.recording import check_batches, check_known, observe, replace

NAME = "moments"
Variables = TypeVar("Variables", bound=Mapping[str, Any])


def recalibrate_linen(
    forward: Callable[[Any, Any], tuple[Any, Any]],
    variables: Variables,
    batches: Iterable[Any],
    *,
    estimator: str = "pooled",
) -> Variables:
    """The variables of a flax.linen model with new running statistics, those of the batches.

    Every flax.linen.BatchNorm, ours or flax's own, that normalizes by the batch gets the mean and
    variance of what it normalized, over all batches. Those that normalize by their running
    statistics keep them.

    Args:
        forward: variables, batch -> what `model.apply` returns in training mode, with mutable
            batch_stats. It is compiled; with one function for several calls, it is compiled once.
        variables: with the collection batch_stats.
        batches: read once, one at a time; each is what forward takes. Training batches, of the size
            and with the augmentation that the network was trained with.
        estimator: "pooled" weighs every value alike, and "paper" every batch
            (`bn_jax.population`).

    Returns:
        The variables with other mean and var in batch_stats, and a count, where there is one, of
        the batches.

    Raises:
        ValueError: no batches, one array in the place of several, or none of the batch norms is
            in training mode.

    >>> import flax.linen as nn, jax
    >>> from bn_jax.layers.linen import BatchNorm
    >>> model = nn.Sequential([nn.Dense(3), BatchNorm(use_running_average=False)])
    >>> x = jax.random.normal(jax.random.key(0), (64, 2))
    >>> variables = model.init(jax.random.key(1), x)
    >>> def forward(variables, x):
    ...     return model.apply(variables, x, mutable=["batch_stats"])
    >>> variables = recalibrate_linen(forward, variables, [x[:32], x[32:]])
    """
    states = conclude(see_linen(forward, variables, batches, estimator), estimator)
    check_known(states)
    flat: dict[Any, Any] = flatten_dict(variables["batch_stats"])
    for layer, state in states.items():
        for name, new in state._asdict().items():
            if (*layer, name) in flat:
                flat[*layer, name] = replace(flat[*layer, name], new, state)
    return with_stats(variables, flat)


def see_linen(
    forward: Callable[[Any, Any], tuple[Any, Any]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    estimator: str,
) -> Any:
    """What the batch norms have seen after all batches, by their paths in batch_stats."""
    check_estimator(estimator)
    check_batches(batches)
    seen = None
    for batch in batches:
        if seen is None:
            seen = zeros(jax.eval_shape(partial(step, forward, estimator), variables, None, batch))
        seen = step(forward, estimator, variables, seen, batch)
    return seen


@partial(jax.jit, static_argnums=(0, 1))
def step(forward: Any, estimator: str, variables: Any, seen: Any, batch: Any) -> Any:
    """What is seen after one more batch, in one compiled call."""
    return include(seen, moments_of(forward, variables, batch), estimator)


def moments_of(
    forward: Callable[[Any, Any], tuple[Any, Any]], variables: Mapping[str, Any], batch: Any
) -> dict[tuple[str, ...], Moments]:
    """What every batch norm normalized in one pass, by its path in batch_stats."""
    return observed(forward, variables, batch)[1]


def observed(
    forward: Callable[[Any, Any], tuple[Any, Any]], variables: Mapping[str, Any], batch: Any
) -> tuple[Any, dict[tuple[str, ...], Moments]]:
    """The output of one pass in training mode, and what every batch norm normalized, by its path.

    The moments are variables of the layer, beside its mean and var, which nn.scan, nn.remat and
    nn.vmap carry out as they do these.
    """

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y, layer = call(*args, **kwargs), context.module
        if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__":
            x, evaluate, mask = arguments(layer, *args, **kwargs)
            if not evaluate:
                seen = observe(layer.get_variable("batch_stats", NAME), layer, x, mask)
                layer.put_variable("batch_stats", NAME, seen)
        return y

    flat: dict[Any, Any] = flatten_dict(variables["batch_stats"])
    layers = [path[:-1] for path in flat if path[-1] == "var"]
    blank = {(*path, NAME): nothing(flat[*path, "mean"], flat[*path, "var"]) for path in layers}
    with nn.intercept_methods(record):
        output, updates = forward(with_stats(variables, flat | blank), batch)
    seen: dict[Any, Any] = flatten_dict(updates.get("batch_stats", {}))
    return output, {path: seen[*path, NAME] for path in layers}


def arguments(
    layer: nn.BatchNorm,
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: Any = None,
    **affine: Any,
) -> tuple[Any, bool | None, Any]:
    """What a layer was called with: x, whether it evaluates, and the mask."""
    given = layer.use_running_average if use_running_average is None else use_running_average
    return x, given, mask


def with_stats(variables: Any, flat: dict[Any, Any]) -> Any:
    """The variables with other batch_stats, in mappings of the kind they came in."""
    stats = type(variables["batch_stats"])(unflatten_dict(flat))
    return type(variables)({**variables, "batch_stats": stats})
