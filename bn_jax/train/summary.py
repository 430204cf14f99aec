"""How a run went, in a few numbers; of several seeds, their means with intervals."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import t as student

from bn_jax.train.config import Arm
from bn_jax.train.loop import Evaluation

LEVELS = (0.90, 0.95, 0.97)
CONFIDENCE = 0.95


def summarize_seed(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Final accuracy, first steps at some levels of accuracy, and median speed of one seed.

    One that diverged has the accuracy of its network before the first of the last bad steps.
    """
    rates = [e.examples_per_second for e in evaluations if e.step > 0]
    return {
        "steps": evaluations[-1].step,
        "diverged": evaluations[-1].diverged,
        "bad_steps": sum(e.bad_steps for e in evaluations),
        "final_test_accuracy": evaluations[-1].test_accuracy,
        "best_test_accuracy": max(e.test_accuracy for e in evaluations),
        "steps_to": {f"{level:.2f}": first_step(evaluations, level) for level in LEVELS},
        "examples_per_second": statistics.median(rates) if rates else None,
    }


def summarize_arm(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The summary of one seed; of several, their means, half of each 95% interval, and each seed.

    Seeds that have diverged are left out of the means, unless all have. The mean of steps to a
    level is None unless every seed has reached it.
    """
    by_seed: dict[int, list[Evaluation]] = {}
    for evaluation in evaluations:
        by_seed.setdefault(evaluation.seed, []).append(evaluation)
    seeds = {seed: summarize_seed(some) for seed, some in by_seed.items()}
    rows = list(seeds.values())
    if len(rows) == 1:
        return rows[0]
    sound = [row for row in rows if not row["diverged"]] or rows
    accuracies = {
        name: estimate(row[name] for row in sound)
        for name in ("final_test_accuracy", "best_test_accuracy")
    }
    levels = {
        level: estimate(row["steps_to"][level] for row in sound) for level in rows[0]["steps_to"]
    }
    return {
        "steps": max(row["steps"] for row in rows),
        "diverged": all(row["diverged"] for row in rows),
        "bad_steps": sum(row["bad_steps"] for row in rows),
        **{name: mean for name, (mean, _) in accuracies.items()},
        "steps_to": {level: mean for level, (mean, _) in levels.items()},
        "examples_per_second": rows[0]["examples_per_second"],
        "plus_or_minus": {
            **{name: half for name, (_, half) in accuracies.items()},
            "steps_to": {level: half for level, (_, half) in levels.items()},
        },
        "seeds": {str(seed): row for seed, row in seeds.items()},
    }


def estimate(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """The mean of values, and half of its 95% confidence interval by Student's t.

    None where a value is, and for an interval of fewer than two values.
    """
    known = list(values)
    numbers = [value for value in known if value is not None]
    if len(numbers) < len(known):
        return None, None
    mean, count = statistics.fmean(numbers), len(numbers)
    if count == 1:
        return mean, None
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return mean, quantile * statistics.stdev(numbers) / count**0.5


def summarize(arms: Mapping[Arm, Sequence[Evaluation]]) -> dict[str, Any]:
    """The summary of each arm; of two arms also the ratio of their steps to each level."""
    summary: dict[str, Any] = {"arms": {arm: summarize_arm(e) for arm, e in arms.items()}}
    if len(arms) == 2:
        with_bn, without = (summary["arms"][arm]["steps_to"] for arm in ("batch", "none"))
        summary["steps_without_over_with"] = {
            level: without[level] / with_bn[level] if without[level] and with_bn[level] else None
            for level in with_bn
        }
    return summary


def first_step(evaluations: Sequence[Evaluation], level: float) -> int | None:
    """The step of the first evaluation at or above a test accuracy, or None."""
    return next((e.step for e in evaluations if e.test_accuracy >= level), None)
