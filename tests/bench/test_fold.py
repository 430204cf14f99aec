"""A smoke of the suite `fold` on a small network."""

from bn_jax.bench import fold


def test_fold():
    report = fold.run(turns=2, layers=2, batches=(1, 2), features=2)
    assert [(r["batch"], r["contender"]) for r in report.rows] == [
        (batch, name) for batch in (1, 2) for name in ("folded", "unfolded")
    ]
    assert all(r["milliseconds"] > 0 for r in report.rows)
    assert report.rows[0]["ratio"] == 1
    assert report.tables[0].row_count == 4
