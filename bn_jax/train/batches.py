"""Which examples each step sees: a function of a key and the step alone."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int, UInt32

ROUNDS = 8


def batch_indices(
    key: Array, step: Int[Array, ""], steps: int, batch_size: int, examples: int
) -> Int[Array, "steps batch_size"]:
    """Which examples the next steps see: a function of key and step alone.

    Each epoch goes through all examples in an order of its own; what is left after the last whole
    batch waits for another epoch.
    """
    per_epoch = examples // batch_size

    def batch(step: Int[Array, ""]) -> Int[Array, " batch_size"]:
        places = step % per_epoch * batch_size + jnp.arange(batch_size)
        return shuffled(places, jax.random.fold_in(key, step // per_epoch), examples)

    return jax.vmap(batch)(step + jnp.arange(steps))


def shuffled(places: Int[Array, " n"], key: Array, count: int) -> Int[Array, " n"]:
    """What stands at some places of the numbers below count, put into a random order.

    Each place is computed by itself, by a Feistel network over the next larger even number of bits,
    applied again where it leads out of the numbers below count (cycle walking: Black & Rogaway
    2002; for shuffling: Mitchell, Stokes, Frank & Holmes 2021). To sort 60,000 numbers, as
    `jax.random.permutation` does, takes as long as tens of training steps.
    """
    half = max(3, -(-(count - 1).bit_length() // 2))
    low = jnp.uint32((1 << half) - 1)
    keys = jax.random.bits(key, (ROUNDS,), jnp.uint32)

    def permute(numbers: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
        left, right = numbers >> half, numbers & low
        for round_key in keys:
            left, right = right, left ^ (hashed(right ^ round_key) & low)
        return (left << half) | right

    def outside(numbers: UInt32[Array, " n"]) -> Array:
        return numbers >= jnp.uint32(count)

    return lax.while_loop(
        lambda numbers: outside(numbers).any(),
        lambda numbers: jnp.where(outside(numbers), permute(numbers), numbers),
        # Places that are not below count could be led around outside for ever.
        permute(places.astype(jnp.uint32) % jnp.uint32(count)),
    ).astype(places.dtype)


def hashed(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Bits, each of which depends on all bits given (the finalizer of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
