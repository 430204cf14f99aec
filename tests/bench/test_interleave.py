"""Contenders take turns, and ratios are taken turn by turn."""

import statistics
import time

import pytest

from bn_jax.bench import interleave as module
from bn_jax.bench.interleave import interleave


@pytest.fixture
def clock(monkeypatch):
    """A clock that only a contender moves."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(module, "PAUSE", 0)
    assert module.time.perf_counter() == 0.0
    return Clock


def test_turns_alternate_and_the_first_does_not_count(clock):
    order = []

    def contender(name, seconds):
        def run():
            order.append(name)
            clock.now += 100 if len(order) <= 2 else seconds

        return run

    timings = interleave({"a": contender("a", 1), "b": contender("b", 3)}, reference="a", turns=4)
    assert order == ["b", "a", "a", "b"] * 2 + ["b", "a"]  # who begins rotates
    assert timings["a"].seconds == [1] * 4
    assert timings["b"].seconds == [3] * 4
    assert timings["a"].ratio == 1
    assert timings["b"].ratio == 3


def test_a_machine_that_slows_down_leaves_the_ratio(clock):
    slowness = iter([1, 1, 1, 1, 9, 9, 1, 1, 5, 5])  # turn by turn

    def contender(seconds):
        def run():
            clock.now += seconds * next(slowness)

        return run

    timings = interleave({"a": contender(1), "b": contender(2)}, reference="a", turns=4)
    assert timings["b"].ratios == [2] * 4
    assert timings["b"].quartiles == (2, 2)
    assert timings["b"].median == statistics.median([2, 18, 2, 10])
