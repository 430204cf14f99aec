"""Why does evaluation disagree with training? Questions that a model answers about itself.

`explain` takes moments and states. For models of Flax there are `explain_linen` and `explain_nnx`
in `bn_jax.explain.models`, which imports flax.
"""

from bn_jax.explain.functional import explain
from bn_jax.explain.independence import assert_independent
from bn_jax.explain.report import Report

__all__ = ["Report", "assert_independent", "explain"]
