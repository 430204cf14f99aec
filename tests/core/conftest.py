"""Fixtures of the core's tests."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_to_compile():
    """For tests of hundreds of small functions: the speed of none of them matters."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
