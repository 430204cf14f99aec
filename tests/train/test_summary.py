"""How a run went, in a few numbers; and the lines that it leaves while it goes."""

import json
import math

import pytest

from bn_jax.train.loop import Evaluation
from bn_jax.train.run_folder import metrics_line
from bn_jax.train.summary import summarize


def run(*accuracies, every=100, rates=None):
    rates = rates or [600.0] * (len(accuracies) - 1)
    return [
        Evaluation(every * n, 1.0, accuracy, rate)
        for n, (accuracy, rate) in enumerate(zip(accuracies, [0.0, *rates], strict=True))
    ]


def test_an_arm():
    (arm,) = summarize({"batch": run(0.1, 0.93, 0.95, 0.96, rates=[6.0, 60.0, 7.0])})[
        "arms"
    ].values()
    assert arm == {
        "steps": 300,
        "diverged": False,
        "bad_steps": 0,
        "final_test_accuracy": 0.96,
        "best_test_accuracy": 0.96,
        "steps_to": {"0.90": 100, "0.95": 200, "0.97": None},
        # The median, and not of the evaluation before the first step.
        "examples_per_second": 7.0,
    }


def test_the_first_step_at_a_level_counts_even_if_it_is_lost_again():
    (arm,) = summarize({"none": run(0.1, 0.91, 0.5, 0.89)})["arms"].values()
    assert arm["steps_to"]["0.90"] == 100
    assert (arm["final_test_accuracy"], arm["best_test_accuracy"]) == (0.89, 0.91)


def test_the_comparison_is_without_over_with():
    arms = {"batch": run(0.1, 0.92, 0.96, 0.98), "none": run(0.1, 0.5, 0.6, 0.91)}
    ratios = summarize(arms)["steps_without_over_with"]
    # .90 at 300 and 100; .95 never and 200; .97 never and 300.
    assert ratios == {"0.90": 3.0, "0.95": None, "0.97": None}


@pytest.mark.parametrize("arm", ["batch", "none"])
def test_one_arm_has_no_comparison(arm):
    assert summarize({arm: run(0.1, 0.2)}).keys() == {"arms"}


def test_a_run_without_steps():
    (arm,) = summarize({"batch": run(0.1)})["arms"].values()
    assert (arm["steps"], arm["final_test_accuracy"]) == (0, 0.1)
    assert arm["examples_per_second"] is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_line_of_metrics_is_json_whatever_happened(loss):
    line = metrics_line("batch", Evaluation(5, loss, 0.25, 60.0))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {
        "arm": "batch",
        "step": 5,
        "train_loss": None,
        "test_accuracy": 0.25,
        "examples_per_second": 60.0,
        "bad_steps": 0,
        "diverged": False,
        "seed": 0,
        "cell": 0,
    }
    assert line.endswith("}\n")
    assert line.count("\n") == 1


def test_numbers_keep_their_digits():
    line = metrics_line("none", Evaluation(5, 1 / 3, 2 / 3, 1e5 / 3))
    record = json.loads(line)
    assert (record["train_loss"], record["test_accuracy"]) == (1 / 3, 2 / 3)
