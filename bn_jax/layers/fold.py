"""Folding whole Flax models for inference; the code is in `bn_jax.inference.fold_models`."""

from bn_jax.inference.fold_chain import FoldReport as FoldReport
from bn_jax.inference.fold_models import fold_linen as fold_linen
from bn_jax.inference.fold_models import fold_nnx as fold_nnx
from bn_jax.inference.fold_models import identity as identity
from bn_jax.inference.fold_traced import FoldedModule as FoldedModule
