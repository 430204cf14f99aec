"""How a run went, in a few numbers; of several seeds, their means with intervals."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import t as student

from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.loop import Evaluation

LEVELS = (0.90, 0.95, 0.97)
CONFIDENCE = 0.95
FINAL = "final_test_accuracy"
ACCURACIES = (FINAL, "best_test_accuracy")

Row = dict[str, Any]


def summarize(arms: Mapping[Arm, Sequence[Evaluation]]) -> Row:
    """The summary of each arm; of two arms also the ratio of their steps to each level."""
    summary: Row = {"arms": {arm: summarize_arm(e) for arm, e in arms.items()}}
    if len(arms) == 2:
        with_bn, without = (summary["arms"][arm]["steps_to"] for arm in ("batch", "none"))
        summary["steps_without_over_with"] = {
            level: without[level] / with_bn[level] if without[level] and with_bn[level] else None
            for level in with_bn
        }
    return summary


def summarize_arm(evaluations: Sequence[Evaluation]) -> Row:
    """The summary of one seed; of several, their means, half of each 95% interval, and each seed.

    Seeds that have diverged are left out of the means, unless all have. The mean of steps to a
    level is None unless every seed has reached it.
    """
    seeds = sorted({e.seed for e in evaluations})
    rows = [summarize_seed([e for e in evaluations if e.seed == seed]) for seed in seeds]
    if len(rows) == 1:
        return rows[0]
    sound = [row for row in rows if not row["diverged"]] or rows
    estimates = {name: estimate(row[name] for row in sound) for name in ACCURACIES}
    levels = {
        level: estimate(row["steps_to"][level] for row in sound) for level in rows[0]["steps_to"]
    }
    means, halves = (
        {name: both[part] for name, both in estimates.items()}
        | {"steps_to": {level: both[part] for level, both in levels.items()}}
        for part in (0, 1)
    )
    return {
        "steps": max(row["steps"] for row in rows),
        "diverged": all(row["diverged"] for row in rows),
        "bad_steps": sum(row["bad_steps"] for row in rows),
        **means,
        "examples_per_second": rows[0]["examples_per_second"],
        "plus_or_minus": halves,
        "seeds": dict(zip(map(str, seeds), rows, strict=True)),
    }


def summarize_seed(evaluations: Sequence[Evaluation]) -> Row:
    """Final accuracy, first steps at some levels of accuracy, and median speed of one seed.

    One that diverged has the accuracy of its network before the first of the last bad steps.
    """
    last = evaluations[-1]
    rates = [e.examples_per_second for e in evaluations if e.step > 0]
    return {
        "steps": last.step,
        "diverged": last.diverged,
        "bad_steps": sum(e.bad_steps for e in evaluations),
        FINAL: last.test_accuracy,
        "best_test_accuracy": max(e.test_accuracy for e in evaluations),
        "steps_to": {
            f"{level:.2f}": next((e.step for e in evaluations if e.test_accuracy >= level), None)
            for level in LEVELS
        },
        "examples_per_second": statistics.median(rates) if rates else None,
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


def diverged_seeds(row: Row) -> int:
    """How many seeds of an arm's summary have diverged."""
    return sum(seed["diverged"] for seed in row.get("seeds", {"": row}).values())


def grid_rows(arms: Mapping[Arm, Sequence[Evaluation]], config: TrainConfig) -> list[Row]:
    """A flat row per arm and combination of values, as in `sweep.csv`."""
    rows: list[Row] = []
    for arm, evaluations in arms.items():
        for number, values in enumerate(config.grid):
            row = summarize_arm([e for e in evaluations if e.cell == number])
            lost, _ = diverged_seeds(row), row.pop("seeds", None)
            levels = {f"steps_to_{level}": steps for level, steps in row.pop("steps_to").items()}
            half = row.pop("plus_or_minus", {FINAL: None})[FINAL]
            row |= {"diverged": lost, f"{FINAL}_plus_or_minus": half} | levels
            rows.append({"arm": arm, **values, "seeds": config.seeds, **row})
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
