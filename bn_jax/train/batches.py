"""Which examples each step sees: a function of a key and the step alone."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int


def batch_indices(
    key: Array, step: Int[Array, ""], steps: int, batch_size: int, examples: int
) -> Int[Array, "steps batch_size"]:
    """Which examples the next steps see: a function of key and step alone.

    Each epoch goes through all examples in an order of its own; what is left after the last whole
    batch waits for another epoch.
    """
    per_epoch = examples // batch_size
    first, offset = step // per_epoch, step % per_epoch

    def order(epoch: Array) -> Array:
        shuffled = shuffle(jax.random.fold_in(key, epoch), examples)
        return shuffled[: per_epoch * batch_size].reshape(per_epoch, batch_size)

    def rows_needed(epoch: Array) -> Array:
        # Shuffling 60,000 numbers costs as much as tens of steps: only where it is needed.
        needed = epoch * per_epoch < offset + steps
        nothing = jnp.zeros((per_epoch, batch_size), int)
        return lax.cond(needed, lambda: order(first + epoch), lambda: nothing)

    epochs = -(-steps // per_epoch) + 1
    rows = lax.map(rows_needed, jnp.arange(epochs)).reshape(-1, batch_size)
    return lax.dynamic_slice_in_dim(rows, offset, steps)


def shuffle(key: Array, count: int) -> Int[Array, " count"]:
    """The numbers below count in random order.

    Like `jax.random.permutation`, sorts by random numbers until ties are unlikely to matter, but
    with each index in the low bits of its random number: on a CPU, XLA sorts single numbers four
    times as fast as pairs, and shuffling 60,000 pairs takes as long as a hundred training steps.
    """
    index_bits = max(count - 1, 1).bit_length()
    # As many random bits per number as jax.random.permutation asks for: 3 log₂(count).
    rounds = math.ceil(3 * index_bits / (32 - index_bits))
    order, positions = jnp.arange(count), jnp.arange(count, dtype=jnp.uint32)
    for round_key in jax.random.split(key, rounds):
        noise = jax.random.bits(round_key, (count,), jnp.uint32) >> index_bits << index_bits
        mixed = lax.sort(noise | positions, is_stable=False) & jnp.uint32((1 << index_bits) - 1)
        order = order[mixed]
    return order
