"""How long is left of a run of claims, by what each took when the committed report was made."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPORT = Path(__file__).parent / "report"
"""The committed report."""


def committed_seconds() -> dict[str, float]:
    """What each claim took then."""
    runs = json.loads((REPORT / "results.json").read_text())["runs"]
    return {name: run["seconds"] for name, run in runs.items()}


class Pace:
    """Tells the time left of claims that are measured one after the other."""

    def __init__(self, names: Sequence[str], expected: Mapping[str, float], factor: float = 1.0):
        """Begin with the first.

        Args:
            names: of the claims, in their order.
            expected: seconds of each claim that has a known time; others count as their mean.
            factor: how much slower than that this run is expected to be.
        """
        usual = sum(expected.values()) / len(expected) if expected else 60.0
        self.waiting = [expected.get(name, usual) * factor for name in names]
        self.planned = self.taken = 0.0
        self.begun = time.monotonic()

    def next(self) -> None:
        """A claim has been measured."""
        now = time.monotonic()
        self.planned += self.waiting.pop(0)
        self.taken += now - self.begun
        self.begun = now

    def left(self) -> float:
        """Seconds until all are measured, at the pace so far."""
        pace = self.taken / self.planned if self.planned else 1.0
        this, *later = self.waiting
        return max(this * pace - (time.monotonic() - self.begun), 0.0) + sum(later) * pace
