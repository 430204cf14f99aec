"""Timing for a noisy machine: contenders take turns, and ratios are taken within a turn.

If the machine slows down, it slows down all contenders of that turn. So the ratio within a turn
hardly changes, unlike the ratio of two separate averages.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

PAUSE = 0.02
Contenders = Mapping[str, Callable[[], object]]


class Timing(NamedTuple):
    """The timings of one contender.

    Attributes:
        seconds: the time of each turn.
        ratios: for each turn, the time as a multiple of the reference's.

    >>> timing = Timing([1.0, 2.0, 4.0], [0.5, 1.0, 1.5])
    >>> timing.median, timing.ratio
    (2.0, 1.0)
    """

    seconds: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        """The median time, in seconds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """The median of the ratios to the reference."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of the ratios."""
        first, _, third = statistics.quantiles(self.ratios, n=4)
        return first, third


def interleave(
    contenders: Contenders, *, reference: str, turns: int = 15, warm: bool = False
) -> dict[str, Timing]:
    """Time functions in turns, after one turn that is not counted.

    Each turn starts with another contender. A pause before each call lets threads that wait in a
    loop (OpenMP's, and so torch's) give up the cores.

    Args:
        contenders: name -> a function that blocks until its work is done.
        reference: the contender that ratios are relative to.
        turns: how many turns are counted; at least 2.
        warm: call each function once more before it is timed. Use it for calls so short that the
            time to wake up from the pause matters.

    >>> timings = interleave({"a": lambda: None, "b": lambda: None}, reference="a", turns=2)
    >>> timings["a"].ratio
    1.0
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    for turn in range(turns + 1):
        order.append(order.pop(0))
        for name, run in order:
            time.sleep(PAUSE)
            if warm:
                run()
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    base = seconds[reference]
    return {
        name: Timing(times, [a / b for a, b in zip(times, base, strict=True)])
        for name, times in seconds.items()
    }
