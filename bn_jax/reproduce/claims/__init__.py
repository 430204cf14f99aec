"""The claims, in the order of the report; a new one is a file here and its name below."""

from bn_jax.reproduce.claim import Claim
from bn_jax.reproduce.claims import (
    batch_size,
    covariate_shift,
    figure_1,
    learning_rates,
    noise,
    population,
    renormalization,
    robustness,
    shift,
    tower,
    weight_decay,
)

_FILES = (
    *(figure_1, robustness, learning_rates, population, renormalization, shift, noise),
    *(weight_decay, batch_size, tower, covariate_shift),
)
CLAIMS: dict[str, Claim] = {file.claim.name: file.claim for file in _FILES}
