"""The picture: what it marks, and what becomes of the file."""

import sys

import numpy as np
import pytest

import bn_jax as bn
from bn_jax.explain import explain
from bn_jax.explain.picture import LEAST, MOST, draw


def a_report():
    """Two layers; the second has a dead, an exploding and a broken feature."""
    random = np.random.default_rng(0)
    data = random.normal(size=(2, 20, 16, 6)).astype(np.float32)
    data[1, ..., 0], data[1, ..., 1] = 5, 1e5 * data[1, ..., 1]
    moments = [
        {n: bn.Moments(x.mean(0), x.var(0), np.full(6, 16.0, np.float32)) for n, x in pair}
        for pair in ((("first", a), ("second", b)) for a, b in zip(*data, strict=True))
    ]
    states = bn.population(moments)
    second = states["second"]
    states["second"] = second._replace(var=second.var.at[2].set(np.nan))
    return explain(states, moments, batch_size=16)


REPORT = a_report()


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_every_layer_has_its_line_and_its_marks():
    axes, *others = draw({"": REPORT}).subfigs[0].axes
    assert not others  # nothing was scored
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    shown = lines_of(axes)
    assert {"dead", "exploding", "not finite", "a feature"} <= shown.keys()
    for mark in ("dead", "exploding", "not finite"):
        assert shown[mark].get_ydata() == [1]  # in the second layer
    dots = [line for line in axes.lines if line.get_label() == "a feature"]
    assert [len(line.get_xdata()) for line in dots] == [6, 4]
    shapes = {line.get_marker() for line in axes.lines}
    assert len(shapes) == 6  # told apart without colors: dot, line, diamond and three marks


def test_what_is_shown_is_the_change():
    axes = draw({"": REPORT}).subfigs[0].axes[0]
    dots = next(line for line in axes.lines if line.get_label() == "a feature")
    change = REPORT.rows["first"].of_features.change
    np.testing.assert_allclose(dots.get_xdata(), np.clip(change, LEAST, MOST))


def test_scores_are_beside_it():
    import dataclasses

    scored = dataclasses.replace(REPORT, scores={"running": 0.5, "batch": 0.75})
    figure = draw({"one": scored, "two": scored})
    assert len(figure.subfigs) == 2
    bars = figure.subfigs[1].axes[1]
    assert [text.get_text() for text in bars.texts] == ["running 0.5000", "batch 0.7500"]
    assert "accuracy by statistics: 0.5000 running, 0.7500 batch" in str(scored)


def test_the_file(tmp_path):
    REPORT.plot(tmp_path / "explain.png")
    assert [path.name for path in tmp_path.iterdir()] == ["explain.png"]
    assert (tmp_path / "explain.png").read_bytes().startswith(b"\x89PNG")


def test_jupyter_shows_it():
    assert REPORT._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="a picture needs matplotlib: pip install matplotlib"):
        REPORT.plot()
    assert REPORT._repr_png_() is None
