"""Tries a batch norm on all vectors, and says what is right, what is wrong, and why."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from bn_jax.conform import contract, conventions, suspects
from bn_jax.conform.vectors import Vector, load

Level = Literal["right", "note", "wrong", "not offered"]
CANCELLING = "cancelling variance, E[x²] - E[x]²"
ROUNDED_MEAN = "the mean is rounded to float32 before it is subtracted"
IN_HALF = "statistics are computed in half precision, or rounded to it"
SILENT = "one value per feature gives y = bias, without an error"
NORMAL, LARGE = ("large mean", "mean 0"), ("large mean", "mean 100")
CONTRASTS = (
    ("large mean", "", NORMAL, CANCELLING),
    ("constant feature", "", NORMAL, CANCELLING),
    ("half precision", "float16, mean 0", NORMAL, IN_HALF),
    ("half precision", "", LARGE, IN_HALF),
    ("half precision", "", NORMAL, CANCELLING),
    ("evaluation", "bfloat16", ("evaluation", "float32"), IN_HALF),
    ("running average", "bfloat16", ("running average", "3 batches"), IN_HALF),
    ("padding holds NaN", "", ("mask", "8 of 12"), "what is in the padding leaks out"),
)
"""Where something is wrong, how its vectors' names start, what is right nonetheless, the bug."""


class Finding(NamedTuple):
    """What came of one function on one vector.

    Attributes:
        group: what was tried, e.g. "large mean".
        vector: the vector's name.
        call: the function's name.
        level: right; note (a convention or weakness to know of); wrong; not offered.
        names: the known bugs or conventions that were recognized.
        detail: the size of the error, or the message of what went wrong.
    """

    group: str
    vector: str
    call: str
    level: Level
    names: tuple[str, ...] = ()
    detail: str = ""


def try_all(candidate: contract.Candidate) -> list[Finding]:
    """Try each of a candidate's functions on each vector.

    >>> from bn_jax.conform.find import find
    >>> findings = try_all(find("bn_jax.conform.example"))
    >>> {finding.level for finding in findings}
    {'right'}
    """
    return contrast([try_one(candidate, call, v) for v in load() for call in v.calls])


def try_one(candidate: contract.Candidate, call: str, vector: Vector) -> Finding:
    """Try one function on one vector."""
    here = Finding(vector.group, vector.name, call, "right")
    try:
        results = contract.call(candidate, call, vector)
    except contract.NotOfferedError as error:
        return here._replace(level="not offered", detail=str(error))
    except contract.MalformedError as error:
        names = (suspects.WRONG_AXIS,) if suspects.WRONG_AXIS in str(error) else ()
        return here._replace(level="wrong", names=names, detail=str(error))
    except contract.RefusedError as error:
        may = vector.check == "refusal" or vector.name == "an empty batch"
        if may and error.about_values:
            return here._replace(names=("refused with an error",))
        if vector.dtype != "float32" and str(error).startswith(("TypeError", "UFuncTypeError")):
            return here._replace(level="not offered", detail=str(error))
        return here._replace(level="wrong", detail=f"{call} raised {error}")
    return CHECKS[vector.check](here, results, vector, candidate)


def check_close(here: Finding, results: dict[str, np.ndarray], vector: Vector, _: Any) -> Finding:
    """The results are those expected."""
    expected, known = vector.expected, None
    level: Level = "right"
    names: list[str] = []
    details: list[str] = []
    for quantity, value in results.items():
        wanted, allowed = np.asarray(expected[quantity]), vector.tolerance[quantity]
        error = distance(value, wanted, allowed)
        if error <= 1:
            continue
        if vector.lenient and distance(value, wanted, vector.lenient[quantity]) <= 1:
            level = "note" if level == "right" else level
            names.append(ROUNDED_MEAN)
            continue
        level = "wrong"
        known = known or suspects.of(vector, here.call)
        names += recognize(value, wanted, known.get(quantity, []), allowed, error)
        details.append(describe(quantity, value, wanted, allowed))
    if level == "wrong":
        names = [name for name in names if name != ROUNDED_MEAN]
    return here._replace(level=level, names=unique(names), detail="; ".join(details))


def check_refusal(here: Finding, results: dict[str, np.ndarray], vector: Vector, _: Any) -> Finding:
    """One value per feature was not refused; y is β at least."""
    wanted = vector.expected["y"]
    if distance(results["y"], wanted, 1e-3) <= 1:
        return here._replace(level="note", names=(SILENT,))
    return here._replace(level="wrong", detail=describe("y", results["y"], wanted, 1e-3))


def check_finite(here: Finding, results: dict[str, np.ndarray], vector: Vector, _: Any) -> Finding:
    """What is remembered is finite."""
    if all(np.isfinite(value).all() for value in results.values()):
        return here
    return here._replace(level="note", names=(f"{vector.name} spoils them for good",))


def check_convention(
    here: Finding, results: dict[str, np.ndarray], vector: Vector, candidate: contract.Candidate
) -> Finding:
    """The running averages follow a known convention, and the one that the candidate states."""

    def closest(named: Iterable[tuple[str, dict[str, np.ndarray]]]) -> str | None:
        near = [(farthest(results, average), name) for name, average in named]
        error, name = min(near, default=(math.inf, None))
        return name if error <= 1 else None

    if name := closest(vector.expected.items()):
        unbiased = name.endswith("unbiased")
        if candidate.unbiased is not None and candidate.unbiased != unbiased:
            found = f"the running variance is {'un' * unbiased}biased, and said not to be"
            return here._replace(level="wrong", names=(found,), detail=name)
        odd = conventions.BIASED_START in name or conventions.NO_DECAY in name
        return here._replace(level="note" if odd else "right", names=(name,))
    known = suspects.of(vector, here.call)
    pairs = zip(known["mean"], known["var"], strict=True)
    mistakes = [(name, {"mean": mean, "var": var}) for (name, mean), (_, var) in pairs]
    names = (name,) if (name := closest(mistakes)) else ()
    details = "follows no known convention" if not names else ""
    return here._replace(level="wrong", names=names, detail=details)


def farthest(results: dict[str, np.ndarray], average: dict[str, np.ndarray]) -> float:
    """The worst distance of running averages, in units of what rounding may do."""
    return max(distance(results[q], average[q], 1e-5 * (1 + np.abs(average[q]))) for q in results)


CHECKS: dict[str, Callable[..., Finding]] = {
    "close": check_close,
    "refusal": check_refusal,
    "finite": check_finite,
    "convention": check_convention,
}


def distance(value: np.ndarray, wanted: np.ndarray, allowed: Any) -> float:
    """The worst error in units of what is allowed, where anything is wanted; infinite for NaN."""
    with np.errstate(invalid="ignore"):
        error = np.abs(value - wanted) / np.maximum(allowed, np.finfo(float).tiny)
    error = error[~np.isnan(np.broadcast_to(wanted, error.shape))]
    return math.inf if np.isnan(error).any() else float(error.max(initial=0))


def recognize(
    value: np.ndarray, wanted: np.ndarray, known: suspects.Suspected, allowed: Any, error: float
) -> list[str]:
    """The bug whose result is nearest where anything is wanted, if it is much nearer than that."""
    asked, near = ~np.isnan(wanted), []
    for name, imitation in known:
        same = np.isnan(value) & np.isnan(imitation) | ~asked
        there, here = (np.where(same, 0, array) for array in (imitation, value))
        near.append((math.inf if np.isnan(there).any() else distance(here, there, allowed), name))
    best, name = min(near, default=(math.inf, ""))
    return [name] if best <= 30 and best < error / 20 else []


def describe(quantity: str, value: np.ndarray, wanted: np.ndarray, allowed: Any) -> str:
    """How far off a result is."""
    asked = ~np.isnan(wanted)
    bad = ~np.isfinite(value) & asked
    if bad.any():
        return f"{quantity} is NaN or infinite in {bad.sum()} of {asked.sum()} places"
    error = np.where(asked, np.abs(value - wanted), 0)
    at = np.unravel_index(np.argmax(error / (np.zeros_like(error) + allowed)), error.shape)
    limit = (np.zeros_like(error) + allowed)[at]
    return f"{quantity} is off by {error[at]:.1e}, allowed {limit:.0e}"


def contrast(findings: list[Finding]) -> list[Finding]:
    """Name what is wrong on one vector and right on another that differs in one thing."""
    levels = {(f.group, f.vector, f.call): f.level for f in findings}
    found = []
    for finding in findings:
        for group, vector, (other_group, other), name in CONTRASTS:
            here = finding.group == group and finding.vector.startswith(vector)
            same = levels.get((other_group, other, finding.call), "wrong") != "wrong"
            if finding.level == "wrong" and here and same:
                finding = finding._replace(names=(name,))
                break
        found.append(finding)
    return found


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Without repetitions, in order."""
    return tuple(dict.fromkeys(names))
