"""What a claim is, and how it is judged: by bands that were written down before the run."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from matplotlib.figure import Figure

from bn_jax.reproduce.intervals import Interval, improvement, mean_interval
from bn_jax.reproduce.study import Study

Results = dict[str, Any]
"""What was measured: names -> numbers, lists of them, and further such dicts, as JSON has them."""

Outcome = Literal["holds", "undecided", "does not hold"]
Verdict = Literal["holds", "holds in part", "does not hold"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that a claim predicts, and what was found.

    Attributes:
        text: what is predicted, with its band.
        found: the mean over the seeds with its interval, or a number without one.
        outcome: undecided where the interval has the band's end in it.
        note: more about it, such as the probability of improvement.
    """

    text: str
    found: Interval | float
    outcome: Outcome
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the literature, on trial.

    Attributes:
        name: on the command line.
        title: in a few words.
        statement: what is claimed.
        source: paper, section, figure.
        published: the numbers there.
        prediction: what was expected here before the run, with the bands.
        protocol: what is trained, how, and what is compared.
        measure: does the work; everything else is made of its results.
        judge: results -> what became of each prediction.
        draw: the results into an empty figure.
        remark: what the results teach; written after the run.
    """

    name: str
    title: str
    statement: str
    source: str
    published: str
    prediction: str
    protocol: str
    measure: Callable[[Study], Results]
    judge: Callable[[Results], list[Check]]
    draw: Callable[[Results, Figure], None]
    remark: str = ""


def verdict(checks: Sequence[Check]) -> Verdict:
    """Of all checks together."""
    held = [check.outcome == "holds" for check in checks]
    return "holds" if all(held) else "holds in part" if any(held) else "does not hold"


def mean_within(text: str, values: Sequence[float], low: float, high: float) -> Check:
    """The mean over seeds lies in a band; its interval is shown, and does not decide.

    The published bands are for means, and as wide as a mean of five seeds needs.
    """
    found = mean_interval(values)
    return Check(text, found, "holds" if low <= found.mean <= high else "does not hold")


def above(text: str, better: Sequence[float], worse: Sequence[float], by: float = 0.0) -> Check:
    """One method beats another by more than some amount, seed by seed: the interval decides."""
    difference = mean_interval(differences(better, worse))
    chance = improvement(better, worse)
    note = f"P(better) = {chance.mean:.2f} [{chance.low:.2f}, {chance.high:.2f}]"
    return Check(text, difference, beyond(difference, by), note)


def beyond(found: Interval, bound: float) -> Outcome:
    """Whether a quantity lies above a bound."""
    return "holds" if found.low > bound else "undecided" if found.high > bound else "does not hold"


def alike(text: str, one: Sequence[float], other: Sequence[float], within: float) -> Check:
    """Two methods differ by less than some amount, seed by seed: the interval decides."""
    difference = mean_interval(differences(one, other))
    inside = -within < difference.low and difference.high < within
    apart = difference.low > within or difference.high < -within
    outcome: Outcome = "holds" if inside else "does not hold" if apart else "undecided"
    return Check(text, difference, outcome)


def true(text: str, found: float, holds: bool) -> Check:
    """A prediction about one number."""
    return Check(text, found, "holds" if holds else "does not hold")


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """The differences of the runs that share a seed."""
    return [a - b for a, b in zip(one, other, strict=True)]
