"""Does output i depend on example j? It must not at evaluation, and batch norm makes it so easily.

Three instances: a train flag that was left on normalizes every example by its neighbours; pooled
statistics tie the members of a vmap together that should be independent; padding changes a result.
All of them show in the Jacobian of any JAX function: a block that should be zero is not.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def assert_independent(
    f: Callable[[Any], Any], x: Any, *, axis: int = 0, padding: Any = None
) -> None:
    """Fail if an output of f for one example depends on another example, or on padding.

    Some examples get a random tangent, the others zero; then the outputs of the others must have
    the tangent zero, exactly. The choices are the digits of the examples' indices in base two, in
    which any two differ, so 2⌈log₂ n⌉ forward-mode derivatives of f see all n(n - 1) pairs: 10 for
    32 examples, each at two to three times the cost of f. Padding takes one more. f is compiled
    once.

    It tells what f does at x: a dependence through integers, a stopped gradient or rectifiers that
    are all closed does not show.

    Args:
        f: x -> outputs, any trees of arrays. In all of them, the axis counts examples.
        x: at least two examples. Random ones will do.
        axis: which axis of every array, input and output, counts the examples, or the members of a
            vmap.
        padding: where x is padding, on which no output at all may depend: True or False in the
            tree and in shapes that broadcast to x's. Let f give only what counts, such as
            jnp.where(mask, y, 0) or a masked loss for each example.

    Raises:
        AssertionError: naming an output and an example on which it depends, or which outputs
            depend on padding. A derivative that is not finite counts as a dependence.
        ValueError: there is one example only, or an output has no such axis.

    >>> import bn_jax as bn
    >>> params, state = bn.init(3)
    >>> x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    >>> assert_independent(lambda x: bn.batch_norm(x, params, state, train=False)[0], x)
    >>> assert_independent(lambda x: bn.batch_norm(x, params, state, train=True)[0], x)
    Traceback (most recent call last):
    AssertionError: output 1 of f depends on example 0; at evaluation, ...
    """
    x = jax.tree.map(jnp.asarray, x)
    n = number_of_examples(x, axis)
    probe = jax.jit(lambda x, selected: moved_outputs(f, x, selected, axis))
    for digit in range(math.ceil(math.log2(n))):
        for value in (0, 1):
            chosen = (np.arange(n) >> digit) % 2 == value
            moved = probe(x, select(chosen, x, axis)) & ~chosen
            if moved.any():
                output = int(np.argmax(moved))
                while chosen.sum() > 1:  # which of them: one half of those that move it, moves it
                    half = chosen & (np.cumsum(chosen) <= chosen.sum() // 2)
                    moves = probe(x, select(half, x, axis))[output]
                    chosen = half if moves else chosen & ~half
                example = int(np.argmax(chosen))
                raise AssertionError(
                    f"output {output} of f depends on example {example}; at evaluation, normalize "
                    "by the running statistics (train=False, use_running_average=True or "
                    "model.eval()); of a vmap, pool nothing over its axis (axis_name)"
                )
    if padding is not None:
        selected = jax.tree.map(lambda where, x: jnp.broadcast_to(where, x.shape), padding, x)
        if (moved := probe(x, selected)).any():
            raise AssertionError(
                f"outputs {np.flatnonzero(moved).tolist()} of f depend on padding; give each layer "
                "that mixes positions the mask (where=mask, or mask=mask), and mask the outputs"
            )


def number_of_examples(x: Any, axis: int) -> int:
    """How many there are along the axis."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    sizes = {shape[axis] if -len(shape) <= axis < len(shape) else 0 for shape in shapes}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            f"x needs two examples or more along axis {axis} of every array, as many in each, but "
            f"its arrays have the shapes {shapes}"
        )
    return sizes.pop()


def select(chosen: np.ndarray, x: Any, axis: int) -> Any:
    """The choice of examples in the shapes of x."""

    def of(leaf: Array) -> Array:
        shape = [1] * leaf.ndim
        shape[axis] = -1
        return jnp.broadcast_to(chosen.reshape(shape), leaf.shape)

    return jax.tree.map(of, x)


def moved_outputs(f: Callable[[Any], Any], x: Any, selected: Any, axis: int) -> Array:
    """Which outputs move when the selected values of x do, each in a random direction."""
    leaves, tree = jax.tree.flatten(x)
    where = jax.tree.leaves(selected)
    moving = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not moving:
        raise ValueError("x holds integers only, by which nothing can be differentiated")

    def of_moving(values: list[Array]) -> Any:
        given = dict(zip(moving, values, strict=True))
        return f(jax.tree.unflatten(tree, [given.get(n, leaf) for n, leaf in enumerate(leaves)]))

    values = [leaves[n] for n in moving]
    directions = [
        jnp.where(where[n], direction(leaves[n], n), jnp.zeros_like(leaves[n])) for n in moving
    ]
    outputs, tangents = jax.jvp(of_moving, (values,), (directions,))
    examples = number_of_examples(x, axis)
    moved = jnp.zeros(examples, bool)
    for output, tangent in zip(*map(jax.tree.leaves, (outputs, tangents)), strict=True):
        shape = output.shape
        if not -len(shape) <= axis < len(shape) or shape[axis] != examples:
            raise ValueError(
                f"an output of f has shape {shape}, but needs the {examples} examples along axis "
                f"{axis}; let f return what it gives for each example, and no states"
            )
        if tangent.dtype != jax.dtypes.float0:
            others = [a for a in range(output.ndim) if a != axis % output.ndim]
            moved = moved | jnp.any(tangent != jnp.zeros_like(tangent), others)
    return moved


def direction(leaf: Array, seed: int) -> Array:
    """Normal numbers, in which no dependence cancels but by chance."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=leaf.shape), leaf.dtype)
