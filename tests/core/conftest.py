"""Fixtures of the core's tests."""

import pytest


@pytest.fixture
def quick_to_compile():
    """All tests are, but those marked ``optimized``."""
