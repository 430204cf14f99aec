"""Why does evaluation disagree with training? Questions that a model answers about itself."""

from bn_jax.explain.independence import assert_independent as assert_independent
