"""New running statistics for a network whose weights were changed: Algorithm 2 for whole models.

Weights that were averaged (EMA, SWA), pruned, quantized or taken from a checkpoint without
statistics do not fit the running statistics that training left. Both functions pass training
batches through the network in training mode, see what every batch norm normalizes, and put the
population's statistics in the place of the running ones. Nothing else of the model changes.

    recalibrate_linen(forward, variables, batches)   for flax.linen
    recalibrate_nnx(forward, model, batches)         for flax.nnx
    bn_jax.population(moments)                       for functions that return their moments
"""

from bn_jax.inference.recalibrate_linen import recalibrate_linen as recalibrate_linen
from bn_jax.inference.recalibrate_nnx import recalibrate_nnx as recalibrate_nnx
