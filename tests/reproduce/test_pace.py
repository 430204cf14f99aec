"""The time left of a run of claims."""

import pytest

from bn_jax.reproduce import pace
from bn_jax.reproduce.claims import CLAIMS


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    time = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: time[0])
    return time


def test_at_first_it_is_what_the_committed_run_took(clock):
    left = pace.Pace(["a", "b"], {"a": 60.0, "b": 30.0, "c": 500.0}, factor=2.0)
    assert left.left() == 180
    clock[0] += 20
    assert left.left() == 160


def test_a_slower_machine_is_noticed(clock):
    left = pace.Pace(["a", "b", "c"], {"a": 60.0, "b": 30.0, "c": 10.0})
    clock[0] += 180
    assert left.left() == 40  # `a` is overdue, and will end at any moment
    left.next()
    assert left.left() == 120


def test_a_claim_without_a_known_time_takes_the_mean(clock):
    assert pace.Pace(["new"], {"a": 60.0, "b": 30.0}).left() == 45


def test_every_claim_has_a_known_time():
    assert pace.committed_seconds().keys() == CLAIMS.keys()
