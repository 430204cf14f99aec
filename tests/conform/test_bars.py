"""Each bar can be missed."""

import numpy as np
import pytest

from bn_jax.conform import bars, oracle


@pytest.mark.parametrize("quantity", bars.QUANTITIES)
def test_an_error_of_each_quantity_is_seen(quantity):
    """Each bar can be missed: an outcome off by a thousandth of the quantity's size."""
    x, dy = bars.normal(60, 4, 10.0)
    right, known = oracle.step(x, dy)
    allowed = bars.nominal_bars(10.0)
    assert all(
        error <= allowed[q] for q, error in bars.errors(right, right, known, dy, 10.0).items()
    )
    value = getattr(right, quantity)
    for wrong in (value + 1e-3 * np.abs(value).max(), np.full_like(value, np.nan)):
        errors = bars.errors(right._replace(**{quantity: wrong}), right, known, dy, 10.0)
        assert [q for q, error in errors.items() if error > allowed[q]] == [quantity]
