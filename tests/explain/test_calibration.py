"""The figures of the documentation: first verdicts on planted faults and on healthy runs."""

from pathlib import Path

import pytest

from bn_jax.explain.causes import CAUSES, TRAIN_FLAG
from tests.explain.calibrate import REPORT, TUNE, calibrate, table

PAGE = Path(__file__).parents[2] / ".docs" / "recipes.md"


def test_figures_are_of_other_seeds_than_thresholds():
    assert not {*TUNE} & {*REPORT}


@pytest.mark.slow
def test_first_verdicts(lenient):
    """Another compiler rounds otherwise: of the table, one verdict in a cell may be another."""
    shown, results = PAGE.read_text(), calibrate(REPORT)
    for line in table(results).splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        documented = next(row for row in shown.splitlines() if row.startswith(f"| {name} |"))
        for cell, there in zip(cells, documented.strip("|").split("|")[1:], strict=True):
            if "/" in cell:
                right, of = map(int, cell.split("/"))
                assert right >= int(there.split("/")[0]) - 1, line
                assert right >= of - 1, line
    assert {cause.name for cause in (TRAIN_FLAG, *CAUSES)} == FOUND
    assert sum(row[0] for rows in results.values() for row in rows.values()) >= 0.97 * 375


FOUND = {
    *("train flag", "not finite", "data not finite", "never updated", "pure batches"),
    *("young average", "inverted momentum", "other weights", "averaged weights", "small batches"),
    *("lagging average", "shifted evaluation", "epsilon", "exploding features", "dead features"),
}
