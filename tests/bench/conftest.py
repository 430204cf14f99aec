"""Suites without their clock: what they time, and what they make of the times."""

import pytest

from bn_jax.bench.interleave import Timing


@pytest.fixture
def run_once(monkeypatch):
    """In a module, what is timed runs once; the reference takes one second, the others two.

    Called with the module, it returns a list, to which each comparison adds its results by name.
    """

    def install(module):
        comparisons = []

        def interleave(contenders, *, reference, **_):
            comparisons.append({name: run() for name, run in contenders.items()})
            seconds = {name: 1.0 if name == reference else 2.0 for name in contenders}
            return {name: Timing([s, s], [s, s]) for name, s in seconds.items()}

        monkeypatch.setattr(module, "interleave", interleave)
        return comparisons

    return install
