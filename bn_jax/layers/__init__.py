"""Framework shells around the core, without arithmetic of their own."""

from bn_jax.layers.single_value import SingleValueWarning as SingleValueWarning
