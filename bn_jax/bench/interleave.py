"""Timing that survives a noisy machine: contenders take turns, and ratios are taken turn by turn.

A machine that slows down slows all contenders of that turn alike; the ratio of one turn hardly
notices, where a ratio of two separate averages would.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

PAUSE = 0.02
Contenders = Mapping[str, Callable[[], object]]


class Timing(NamedTuple):
    """The turns of one contender.

    Attributes:
        seconds: of each turn.
        ratios: of each turn, how many times as long as the reference took.
    """

    seconds: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        """The median turn, in seconds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """The median of the ratios to the reference."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartile of the ratios."""
        first, _, third = statistics.quantiles(self.ratios, n=4)
        return first, third


def interleave(
    contenders: Contenders, *, reference: str, turns: int = 15, warm: bool = False
) -> dict[str, Timing]:
    """Time functions that block until their work is done, after one turn that does not count.

    Who begins rotates from turn to turn. Between turns is a pause, in which threads that wait by
    spinning (OpenMP's, and so torch's) give up the cores.

    Args:
        contenders: by name.
        reference: the name that ratios are relative to.
        turns: that count, of every contender; at least 2.
        warm: run once before each turn, for functions so short that waking up counts.
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
