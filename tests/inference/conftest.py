"""Flax's modes, for the tests of folded models."""

from tests.layers.flax_modes import graph_mode, tree_mode  # noqa: F401 (fixtures)
