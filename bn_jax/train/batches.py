"""Which examples each step sees: a function of a key and the step alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int, UInt32

ROUNDS = 8


def batch_indices(
    key: Array, step: Int[Array, ""], steps: int, batch_size: int, examples: int
) -> Int[Array, "steps batch_size"]:
    """Which examples the next steps see.

    Each epoch goes through all examples in an order of its own. The examples left after the last
    whole batch of an epoch are not seen in it.
    """
    per_epoch = examples // batch_size

    def batch(step: Int[Array, ""]) -> Int[Array, " batch_size"]:
        places = step % per_epoch * batch_size + jnp.arange(batch_size)
        return shuffled(places, jax.random.fold_in(key, step // per_epoch), examples)

    return jax.vmap(batch)(step + jnp.arange(steps))


def few_class_indices(
    key: Array,
    step: Int[Array, ""],
    steps: int,
    batch_size: int,
    labels: Int[np.ndarray, " examples"],
    classes: int = 1,
) -> Int[Array, "steps batch_size"]:
    """Which examples the next steps see, where each batch is of a few classes only.

    Such batches are not independent samples of the data, and their statistics are not those of the
    data. Batch Renormalization (Ioffe 2017) was tested on batches of 16 classes with two examples
    each.

    Args:
        key: of the run.
        step: the first of the steps.
        steps: how many.
        batch_size: a multiple of `classes`.
        labels: of all examples.
        classes: how many each batch draws, all equally likely; 1 makes class-pure batches. From
            each of them come equally many examples, drawn with replacement.
    """
    present, starts, counts = np.unique(np.sort(labels), return_index=True, return_counts=True)
    if not 1 <= classes <= len(present) or batch_size % classes:
        raise ValueError(
            f"classes={classes}: must be a divisor of the batch size {batch_size}, and at most "
            f"{len(present)}, the number of classes"
        )
    order, starts, counts = map(jnp.asarray, (np.argsort(labels), starts, counts))

    def batch(step: Int[Array, ""]) -> Int[Array, " batch_size"]:
        for_classes, for_examples = jax.random.split(jax.random.fold_in(key, step))
        drawn = jax.random.permutation(for_classes, len(present))[:classes]
        drawn = jnp.repeat(drawn, batch_size // classes)
        places = jax.random.randint(for_examples, drawn.shape, 0, counts[drawn])
        return order[starts[drawn] + places]

    return jax.vmap(batch)(step + jnp.arange(steps))


def shuffled(places: Int[Array, " n"], key: Array, count: int) -> Int[Array, " n"]:
    """Some places of a random permutation of the numbers below count.

    Each place is computed by itself, by a Feistel network over the next larger even number of bits,
    applied again where its result is not below count (cycle walking: Black & Rogaway 2002; for
    shuffling: Mitchell, Stokes, Frank & Holmes 2021). `jax.random.permutation` sorts instead,
    which for 60,000 numbers takes as long as tens of training steps.
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
        # The walk from a place that is not below count might never end.
        permute(places.astype(jnp.uint32) % jnp.uint32(count)),
    ).astype(places.dtype)


def hashed(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mix bits such that each depends on all bits given (the finalizer of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
