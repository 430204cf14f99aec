"""Batch norm layers for Flax and Equinox. All arithmetic is the core's."""

from bn_jax.layers.single_value import SingleValueWarning as SingleValueWarning
