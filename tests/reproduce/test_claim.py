"""How predictions are judged."""

import pytest

from bn_jax.reproduce.claim import above, alike, mean_within, true, verdict

SEEDS = [0.90, 0.91, 0.92, 0.93, 0.94]


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.9, 0.95, "holds"), (0.93, 1.0, "does not hold"), (0.0, 0.91, "does not hold")],
)
def test_a_mean_lies_in_its_band_or_not(low, high, outcome):
    check = mean_within("text", SEEDS, low, high)
    assert (check.outcome, round(check.found.mean, 3)) == (outcome, 0.92)


@pytest.mark.parametrize(
    ("by", "outcome"), [(0.05, "holds"), (0.1, "undecided"), (0.15, "does not hold")]
)
def test_whether_a_method_is_better_is_decided_by_the_interval(by, outcome):
    worse = [0.8, 0.81, 0.82, 0.825, 0.845]  # differences .1, .1, .1, .105, .095
    check = above("text", SEEDS, worse, by)
    assert check.outcome == outcome
    assert check.note == "P(better) = 1.00 [1.00, 1.00]"


def test_seeds_are_compared_pairwise():
    """Their own spread does not hide a small difference that all of them show."""
    better = [seed + 0.001 for seed in SEEDS]
    assert above("text", better, SEEDS).outcome == "holds"


@pytest.mark.parametrize(
    ("shift", "within", "outcome"),
    [(0.001, 0.01, "holds"), (0.05, 0.01, "does not hold"), (0.01, 0.01, "undecided")],
)
def test_alike_is_decided_by_the_interval(shift, within, outcome):
    spread = [-0.002, 0.0, 0.002, 0.001, -0.001]
    other = [a + shift + b for a, b in zip(SEEDS, spread, strict=True)]
    assert alike("text", SEEDS, other, within).outcome == outcome
    assert alike("text", other, SEEDS, within).outcome == outcome


def test_seeds_of_different_number_are_not_compared():
    with pytest.raises(ValueError, match="shorter"):
        above("text", SEEDS, SEEDS[:-1])


def test_a_verdict_is_that_of_all_checks():
    yes, no = true("text", 1, True), true("text", 1, False)
    assert verdict([yes, yes]) == "holds"
    assert verdict([yes, no]) == "holds in part"
    assert verdict([no, no]) == "does not hold"
