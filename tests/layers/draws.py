"""Inputs drawn by numpy: JAX compiles for seconds before it draws its first number."""

import jax.numpy as jnp
import numpy as np


def normal(shape, mean=0.0, spread=1.0, seed=0):
    """Normal values in float32."""
    return jnp.asarray(np.random.default_rng(seed).normal(mean, spread, shape), jnp.float32)
