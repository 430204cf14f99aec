"""Train many runs in one compiled program, and measure them as they go.

A run is a tree; runs that differ in seeds, or in numbers such as the learning rate, are one tree
with a leading axis, and are trained by `vmap`. Those of one seed see the same batches.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from bn_jax.train.batches import batch_indices

Loss = Callable[..., tuple[Array, Any]]
"""params, run, images, labels -> mean loss, new states"""
Measure = Callable[..., Mapping[str, Array]]
"""run, data -> what is to be known of it, by name"""
Rows = Callable[[Array, Array, int], Int[Array, "steps batch"]]
"""key, step, steps -> which examples each step sees"""


class Data(NamedTuple):
    """Images [examples, 784] with grey levels 0 to 255, and labels, to train and to test on."""

    images: Array
    labels: Array
    test_images: Array
    test_labels: Array


class Run(NamedTuple):
    """One run between two steps.

    Attributes:
        params, states: of the network.
        key: of the seed; batches and noise depend on it and on the step alone.
        step: how many have been taken.
        values: the numbers in which runs differ, by name; the learning rate is one.
    """

    params: Any
    states: Any
    key: Array
    step: Int[Array, ""]
    values: Mapping[str, Float[Array, ""]]


def begin(
    make: Callable[..., tuple[Any, Any]], seeds: int, **values: float | Sequence[float]
) -> Run:
    """Runs before their first step: every seed with every combination of values, seeds innermost.

    Args:
        make: key, values -> params and states.
        seeds: how many, from 0.
        values: of each number one value, or those to combine.
    """
    axes = [np.atleast_1d(np.asarray(v, np.float32)) for v in values.values()]
    grids = [grid.ravel() for grid in np.meshgrid(*axes, np.arange(seeds), indexing="ij")]
    numbers = dict(zip(values, map(jnp.asarray, grids), strict=False))

    def one(seed: Array, values: Mapping[str, Array]) -> Run:
        init_key, key = jax.random.split(jax.random.key(seed))
        params, states = make(init_key, values)
        return Run(params, states, key, jnp.zeros((), jnp.int32), values)

    # Not compiled as a whole: what it is made of is compiled once for all methods of all claims.
    return jax.vmap(one)(jnp.asarray(grids[-1], jnp.int32), numbers)


def shuffled(batch_size: int, examples: int) -> Rows:
    """All examples in a new order each epoch."""
    return lambda key, step, steps: batch_indices(key, step, steps, batch_size, examples)


def train(
    runs: Run,
    loss: Loss,
    data: Data,
    *,
    rows: Rows,
    every: int,
    steps: int,
    measure: Measure,
    together: Callable[[Callable], Callable] = jax.vmap,
    watch: Callable[[int], None] = lambda _: None,
) -> tuple[Run, dict[str, np.ndarray]]:
    """Train by plain SGD, measuring before the first step and after every few.

    Args:
        runs: to train.
        loss: of a run on a batch.
        data: to train on, and for the measurements.
        rows: which examples each step sees.
        every: steps between measurements; divides steps.
        steps: how many.
        measure: what to know of each run.
        together: how to apply a function of one run to all: `jax.vmap`, or `one_by_one`.
        watch: is told the steps taken so far.

    Returns:
        The runs after training, and what was measured: name -> [times, runs, ...], with "step" and
        "train_loss" (a mean over the steps between two measurements, 0 at first).
    """
    if steps % every:
        raise ValueError(f"every={every} must divide steps={steps}")

    def step(run: Run, batch: tuple[Array, Array]) -> tuple[Run, Array]:
        def of_params(params: Any) -> tuple[Array, Any]:
            return loss(params, run, *batch)

        (value, states), grads = jax.value_and_grad(of_params, has_aux=True)(run.params)
        rate = run.values["learning_rate"]
        params = jax.tree.map(lambda p, g: p - (rate * g).astype(p.dtype), run.params, grads)
        return run._replace(params=params, states=states, step=run.step + 1), value

    # Data are arguments: what a compiled function closes over becomes a part of the program.
    @jax.jit
    def some_steps(runs: Run, data: Data) -> tuple[Run, Array]:
        def one(run: Run) -> tuple[Run, Array]:
            def body(run: Run, rows: Array) -> tuple[Run, Array]:
                return step(run, (data.images[rows], data.labels[rows]))

            unroll = 2 if every > 10 else 1  # a few steps are run sooner than they are compiled
            run, losses = lax.scan(body, run, rows(run.key, run.step, every), unroll=unroll)
            return run, losses.mean()

        return together(one)(runs)

    @jax.jit
    def measured(runs: Run, data: Data) -> Mapping[str, Array]:
        return together(lambda run: measure(run, data))(runs)

    records = [{"train_loss": np.zeros(len(runs.step)), **measured(runs, data)}]
    for done in range(every, steps + 1, every):
        runs, losses = jax.block_until_ready(some_steps(runs, data))
        records.append({"train_loss": losses, **measured(runs, data)})
        watch(done)
    series = {name: np.stack([np.asarray(r[name]) for r in records]) for name in records[0]}
    return runs, {"step": np.arange(0, steps + 1, every), **series}


def one_by_one(function: Callable[[Run], Any]) -> Callable[[Run], Any]:
    """A function of one run for all, one after the other.

    For convolutions: under `vmap`, those with a kernel per run become grouped ones, for which XLA's
    CPU compiler has no fast code.
    """
    return functools.partial(lax.map, function)
