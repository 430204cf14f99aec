"""Batch normalization for JAX: pure functions with explicit state.

>>> import jax, bn_jax as bn
>>> params, state = bn.init(64)
>>> x = jax.random.normal(jax.random.key(0), (32, 64))
>>> y, state = bn.batch_norm(x, params, state, train=True)   # normalize by the batch, remember it
>>> y, _ = bn.batch_norm(x, params, state, train=False)      # normalize by what was remembered
"""

from bn_jax.core.averages import Average, CumulativeAverage, DebiasedEma, Ema
from bn_jax.core.batch_norm import batch_norm, init
from bn_jax.core.moments import Moments, measure, merge, pool
from bn_jax.core.normalize import BatchNormParams, as_affine, normalize
from bn_jax.core.pool_states import pool_states
from bn_jax.core.population import population
from bn_jax.core.recalibrate import recalibrate
from bn_jax.core.renorm import batch_renorm
from bn_jax.core.standardize import standardize
from bn_jax.core.state import BatchNormState, advance
from bn_jax.core.xla.barriers import save_statistics
from bn_jax.inference.fold import (
    fold_conv,
    fold_conv_transpose,
    fold_dense,
    fold_into_following_dense,
)

__all__ = [
    "Average",
    "BatchNormParams",
    "BatchNormState",
    "CumulativeAverage",
    "DebiasedEma",
    "Ema",
    "Moments",
    "advance",
    "as_affine",
    "batch_norm",
    "batch_renorm",
    "fold_conv",
    "fold_conv_transpose",
    "fold_dense",
    "fold_into_following_dense",
    "init",
    "measure",
    "merge",
    "normalize",
    "pool",
    "pool_states",
    "population",
    "recalibrate",
    "save_statistics",
    "standardize",
]

__version__ = "0.1.0"
