"""`explain_linen` and `explain_nnx`: why a Flax model's evaluation disagrees with its training."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike

from bn_jax.core.recalibrate import zeros
from bn_jax.core.state import BatchNormState
from bn_jax.explain.causes import TRAIN_FLAG, Api
from bn_jax.explain.functional import gathered, report
from bn_jax.explain.independence import assert_independent
from bn_jax.explain.likeness import Batches
from bn_jax.explain.mixing import in_groups, mix
from bn_jax.explain.report import Report
from bn_jax.inference import recalibrate_linen, recalibrate_nnx
from bn_jax.inference.recording import check_batches
from bn_jax.layers.graph_mode import graph_mode

EXAMPLES = 8  # of a batch, for the train flag: 6 derivatives


def explain_linen(
    forward: Callable[[Any, Any], tuple[Any, Any]],
    variables: Mapping[str, Any],
    training: Iterable[Any],
    evaluation: Iterable[Any] | None = None,
    *,
    evaluate: Callable[[Any, Any], Any] | None = None,
    batch_size: int | None = None,
    epsilon: ArrayLike | None = None,
) -> Report:
    """Why a flax.linen model's evaluation may disagree with its training.

    Compares the running statistics of each batch norm, ours or flax's own, with what it normalizes
    in training mode. Layers that evaluate in forward are left out. Training batches pass twice: as
    they are, and with their examples mixed, to tell whether the batches are drawn at random.

    Args:
        forward: variables, batch -> what `model.apply` returns in training mode, with mutable
            batch_stats, as in `recalibrate_linen`.
        variables: with the collection batch_stats.
        training: some training batches, 50 or more; each is what forward takes.
        evaluation: some evaluation batches. They go through the model in training mode too.
        evaluate: variables, batch -> outputs, as the model is evaluated; to find a train flag that
            was left on, by `assert_independent` on 8 examples.
        batch_size: the examples of a training batch; None for the length of its first array.
        epsilon: of the layers; None for each layer's own.

    Returns:
        A `Report`: print it, plot it, or read its rows and findings.

    Raises:
        ValueError: no batches, one array in the place of several, or none of the batch norms is
            in training mode.

    >>> import flax.linen as nn, jax
    >>> from bn_jax.layers.linen import BatchNorm
    >>> model = nn.Sequential([nn.Dense(3), BatchNorm(use_running_average=False)])
    >>> batches = jax.random.normal(jax.random.key(0), (50, 32, 2))
    >>> variables = model.init(jax.random.key(1), batches[0])
    >>> def forward(variables, x):
    ...     return model.apply(variables, x, mutable=["batch_stats"])
    >>> print(explain_linen(forward, variables, batches).summary)
    never updated (all layers): running statistics are those of a new layer, 0 and 1: ...
    """
    flat = flatten_dict(variables["batch_stats"])
    paths = [path[:-1] for path in flat if path[-1] == "var"]
    states = {path: state_of(flat[*path, "mean"], flat[*path, "var"]) for path in paths}
    layers = dict[Any, Any]()

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            layers[context.module.path] = context.module
        return call(*args, **kwargs)

    def see(batches: Iterable[Any]) -> Iterator[Any]:
        step, blank = partial(recalibrate_linen.step, forward, "pooled", variables), None
        for batch in batches:
            if blank is None:
                # Neither `step` nor a compiled forward, which are traced only once.
                moments = partial(recalibrate_linen.moments_of, inspect.unwrap(forward))
                with nn.intercept_methods(note):
                    jax.eval_shape(moments, variables, batch)
                blank = zeros(jax.eval_shape(step, None, batch))
            yield step(blank, batch)

    return explained(
        *("linen", see, states, training, evaluation),
        evaluate=None if evaluate is None else partial(evaluate, variables),
        batch_size=batch_size,
        epsilon=epsilon,
        layers=layers,
    )


def explain_nnx(
    forward: Callable[[Any, Any], Any],
    model: nnx.Module,
    training: Iterable[Any],
    evaluation: Iterable[Any] | None = None,
    *,
    evaluate: Callable[[Any, Any], Any] | None = None,
    batch_size: int | None = None,
    epsilon: ArrayLike | None = None,
) -> Report:
    """Why a flax.nnx model's evaluation may disagree with its training: `explain_linen` for nnx.

    Args:
        forward: model, batch -> anything; calls the model as in training, as in `recalibrate_nnx`.
        model: in training mode (`model.train()`); it stays as it is.
        training: as in `explain_linen`, like all that follow.
        evaluation: batches.
        evaluate: model, batch -> outputs; it gets a copy of the model.
        batch_size: of a training batch.
        epsilon: of the layers.

    Returns:
        A `Report`.

    Raises:
        ValueError: no batches, one array in the place of several, or none of the batch norms is
            in training mode.

    >>> import jax
    >>> from flax import nnx
    >>> from bn_jax.layers.nnx import BatchNorm
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), BatchNorm(3, rngs=rngs))
    >>> batches = jax.random.normal(jax.random.key(0), (50, 32, 2))
    >>> print(explain_nnx(lambda model, x: model(x), model, batches).summary)
    never updated (all layers): running statistics are those of a new layer, 0 and 1: ...
    """
    layers = recalibrate_nnx.batch_norms(model)
    states = {
        path: state_of(layer.mean.get_value(), layer.var.get_value())
        for path, layer in layers.items()
    }

    def see(batches: Iterable[Any]) -> Iterator[Any]:
        with graph_mode():
            graph, random, rest = nnx.split(model, nnx.RngState, ...)
        step, blank = partial(recalibrate_nnx.step, forward, "pooled", graph), None
        for batch in batches:
            if blank is None:
                blank = zeros(jax.eval_shape(step, random, rest, None, batch)[0])
            seen, random = step(random, rest, blank, batch)
            yield seen

    def evaluate_copy(batch: Any) -> Any:
        assert evaluate is not None
        with graph_mode():
            copy = nnx.merge(*nnx.split(model), copy=True)
        return evaluate(copy, batch)

    return explained(
        *("nnx", see, states, training, evaluation),
        evaluate=None if evaluate is None else evaluate_copy,
        batch_size=batch_size,
        epsilon=epsilon,
        layers=layers,
    )


def explained(
    api: Api,
    see: Callable[[Iterable[Any]], Iterator[Any]],
    states: dict[Any, BatchNormState],
    training: Iterable[Any],
    evaluation: Iterable[Any] | None,
    *,
    evaluate: Callable[[Any], Any] | None,
    batch_size: int | None,
    epsilon: ArrayLike | None,
    layers: Mapping[Any, Any],
) -> Report:
    """The report on what is seen of both kinds of batches."""
    check_batches(training)
    check_batches(evaluation)
    batches = iter(training)
    first = list(itertools.islice(batches, 1))
    is_mixed: list[bool] = []

    def with_mixed() -> Iterator[Any]:
        for group in in_groups(itertools.chain(first, batches)):
            for mixed, some in ((False, group), (True, mix(group))):
                is_mixed.extend([mixed] * len(some))
                yield from some

    def named(batches: Iterable[Any]) -> dict[Any, Batches]:
        paths: list[Any] = []

        def layers(seen: dict[Any, Any]) -> list[Any]:
            paths[:] = seen
            return list(seen.values())

        return dict(zip(paths, gathered(map(layers, see(batches))), strict=True))

    seen = named(with_mixed())
    trained, mixed = (
        {path: Batches(*(part[np.equal(is_mixed, which)] for part in seen[path])) for path in seen}
        for which in (False, True)
    )
    evaluated = None if evaluation is None else named(evaluation)
    used = [path for path in states if trained[path].number.any()]
    if not used:
        raise ValueError(
            "no batch norm normalized by the batch, or nothing was finite, so there is nothing to "
            "compare; call the model as in training: train=True or use_running_average=False, or "
            "model.train() before"
        )
    names = {path: ".".join(map(str, path)) for path in used}
    return report(
        {names[path]: states[path] for path in used},
        {names[path]: trained[path] for path in used},
        {names[path]: mixed[path] for path in used} if any(is_mixed) else None,
        None if evaluated is None else {names[path]: evaluated[path] for path in used},
        batch_size=len(jax.tree.leaves(first)[0]) if batch_size is None else batch_size,
        epsilon={names[path]: own_epsilon(layers.get(path), epsilon) for path in used},
        momentum={names[path]: momentum_of(layers.get(path)) for path in used},
        api=api,
        first=TRAIN_FLAG if evaluate and depends(evaluate, first[0]) else None,
    )


def depends(evaluate: Callable[[Any], Any], batch: Any) -> bool:
    """Whether an output for an example depends on other examples."""
    try:
        assert_independent(evaluate, jax.tree.map(lambda leaf: leaf[:EXAMPLES], batch))
    except AssertionError:
        return True
    return False


def own_epsilon(layer: Any, given: ArrayLike | None) -> ArrayLike:
    """What is given for all layers, or else a layer's own, or else flax's default."""
    return given if given is not None else getattr(layer, "epsilon", 1e-5)


def momentum_of(layer: Any) -> float | None:
    """The weight of the past in a layer's running statistics, where that is one known number."""
    average = getattr(layer, "average", None)
    decay = getattr(layer, "momentum", None) if average is None else getattr(average, "decay", None)
    return float(decay) if isinstance(decay, float | int) else None


def state_of(mean: Any, var: Any) -> BatchNormState:
    """A layer's statistics."""
    return BatchNormState(mean, var, jnp.zeros(jnp.shape(mean), jnp.int32))
