"""Batch normalization for JAX: pure functions with explicit state.

>>> import jax, bn_jax as bn
>>> params, state = bn.init(64)
>>> x = jax.random.normal(jax.random.key(0), (32, 64))
>>> y, state = bn.batch_norm(x, params, state, train=True)   # normalize by the batch, remember it
>>> y, _ = bn.batch_norm(x, params, state, train=False)      # normalize by what was remembered
"""

from bn_jax.core.averages import BatchNormState as BatchNormState
from bn_jax.core.averages import CumulativeAverage as CumulativeAverage
from bn_jax.core.averages import DebiasedEma as DebiasedEma
from bn_jax.core.averages import Ema as Ema
from bn_jax.core.averages import advance as advance
from bn_jax.core.batch_norm import batch_norm as batch_norm
from bn_jax.core.batch_norm import init as init
from bn_jax.core.moments import Moments as Moments
from bn_jax.core.moments import measure as measure
from bn_jax.core.moments import merge as merge
from bn_jax.core.moments import pool as pool
from bn_jax.core.normalize import BatchNormParams as BatchNormParams
from bn_jax.core.normalize import as_affine as as_affine
from bn_jax.core.normalize import normalize as normalize
from bn_jax.core.pool_states import pool_states as pool_states
from bn_jax.core.population import population as population
from bn_jax.inference.fold import fold_conv as fold_conv
from bn_jax.inference.fold import fold_conv_transpose as fold_conv_transpose
from bn_jax.inference.fold import fold_dense as fold_dense
from bn_jax.inference.fold import fold_into_following_dense as fold_into_following_dense

__version__ = "0.1.0"
