"""How a run went, in a few numbers."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bn_jax.train.config import Arm
from bn_jax.train.loop import Evaluation

LEVELS = (0.90, 0.95, 0.97)


def summarize_arm(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Final accuracy, first steps at some levels of accuracy, and median speed of one arm.

    What a diverged arm has is the accuracy of its network before the first of the last bad steps.
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


def summarize(arms: Mapping[Arm, Sequence[Evaluation]]) -> dict[str, Any]:
    """Every arm, and for two of them how many times as many steps the plain network needs."""
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
