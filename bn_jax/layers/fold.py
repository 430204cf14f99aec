"""Folding whole Flax models for inference; the code is in `bn_jax.inference.fold_models`."""

from bn_jax.inference.fold_chain import Report as Report
from bn_jax.inference.fold_models import fold_linen as fold_linen
from bn_jax.inference.fold_models import fold_nnx as fold_nnx
from bn_jax.inference.fold_models import identity as identity
from bn_jax.inference.fold_traced import Folded as Folded
