"""A smoke of the suite `fold` on a small network."""

from bn_jax.bench import fold


def test_fold():
    report = fold.run(turns=2, layers=2, features=2)
    assert [(r["what"], r["contender"]) for r in report.rows] == [
        (what, name)
        for what in ("jitted", "op by op", "compilation")
        for name in ("folded", "unfolded")
    ]
    assert all(r["milliseconds"] > 0 for r in report.rows)
    assert report.rows[0]["ratio"] == 1
    assert report.tables[0].row_count == 6
