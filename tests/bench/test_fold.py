"""The suite `fold`, on a small network: both sides compute the same, and folded is less work."""

import numpy as np

from bn_jax.bench import fold


def test_fold(run_once):
    comparisons = run_once(fold)
    report = fold.run(layers=2, features=2)
    *results, compiled = [tuple(found.values()) for found in comparisons]
    for folded, unfolded in results:
        assert np.abs(unfolded).max() > 0.1
        np.testing.assert_allclose(folded, unfolded, atol=2e-6 * np.abs(unfolded).max())
    lines = [len(one.as_text().splitlines()) for one in compiled]
    assert lines[0] < lines[1]
    rows = [(r["what"], r["contender"], r["milliseconds"], r["ratio"]) for r in report.rows]
    assert rows == [
        (what, name, 1e3 * ratio, ratio)
        for what in ("jitted", "op by op", "compilation")
        for name, ratio in (("folded", 1), ("unfolded", 2))
    ]
    assert report.tables[0].row_count == 6
