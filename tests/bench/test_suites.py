"""A smoke of each suite on small shapes, against the peers that are here."""

import json
import math
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest
from rich.console import Console

from bn_jax import cli
from bn_jax.bench import accuracy, compile_time, layer, memory, suites
from bn_jax.bench.entries import ENTRIES
from bn_jax.bench.peers import FUNCTIONAL, OURS, PEERS, installed
from bn_jax.bench.plots import save_plots
from bn_jax.bench.report import Bar, Report, save, show
from bn_jax.conform import oracle

pytestmark = [pytest.mark.usefixtures("lenient"), pytest.mark.optimized]
HERE = installed()


def test_ours_and_flax_are_always_here():
    assert {OURS, "flax", "flax accurate", "nnx"} <= set(HERE) <= set(PEERS)


@pytest.mark.parametrize("shape", [(20, 4), (4, 3, 3, 4)], ids=str)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.peer) for n in PEERS])
def test_every_peer_computes_batch_norm(name, shape):
    """What is compared is batch norm, with its gradients and statistics, in each library."""
    if name not in HERE:
        pytest.skip(f"{name} is not installed")
    x, dy = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    truth, _ = oracle.step(3 * x + 1, dy)
    found = accuracy.outcome(ENTRIES[name], 3 * x + 1, dy)
    for quantity, value in found._asdict().items():
        wanted = getattr(truth, quantity)
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5, err_msg=quantity)
    built = PEERS[name](3 * x + 1, dy, "float32")
    built.wait(built.step()), built.wait(built.infer())


def test_accuracy_tells_right_from_wrong():
    report = accuracy.run([OURS, "flax"], offsets=(0.0, 1e4), sizes=((60, 4), (3, 4)))
    assert len(report.bars) == 2 * len(accuracy.QUANTITIES)
    assert all(bar.met for bar in report.bars)
    worst = {(r["contender"], r["quantity"], r["offset"]): r["error"] for r in report.rows}
    assert worst["flax", "y", 1e4] > 1e-2 > worst["flax", "y", 0.0]


def test_layer_and_its_plot(tmp_path):
    names = [OURS, "flax", "flax accurate"]
    report = layer.run(names, turns=2, shapes=((200, 100), (2, 3, 3, 4)), dtypes=("float32",))
    found = {(r["what"], tuple(r["shape"]), r["contender"]) for r in report.rows}
    shapes = ((200, 100), (2, 3, 3, 4))
    assert found == {
        (what, shape, name)
        for what in ("step", "infer")
        for shape in shapes
        for name in [*names, layer.COPY]
    }
    ratios = [r["ratio"] for r in report.rows if r["contender"] == OURS]
    assert ratios == [1] * len(ratios)
    (path,) = save_plots([report], tmp_path)
    assert path.stat().st_size > 10_000


def test_bars_of_the_layer_count_the_larger_shapes_only():
    def row(shape, name, ratio):
        timing = layer.Timing([1.0, 1.0], [ratio, ratio])
        return layer.row("step", "float32", shape, name, timing)

    rows = [
        row((60, 100), "flax", 0.1),
        row((1024, 1024), "flax", 2.0),
        row((64, 56, 56, 64), "flax", 0.5),
        row((64, 56, 56, 64), layer.COPY, 0.25),
    ]
    values = {bar.what.split(",")[1].strip(): bar.value for bar in layer.bars(rows)[:1]}
    assert values == {"flax / bn_jax": pytest.approx(1.0)}
    assert [bar.met for bar in layer.bars(rows)] == [False, False, True]


def test_memory_keeps_x_and_numbers_per_feature():
    shape = (4, 8, 8, 16)
    report = memory.run([OURS, "flax"], shape=shape, depth=2)
    kept = {(r["dtype"], r["contender"]): r["residuals"] for r in report.rows}
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        x = math.prod(shape) * itemsize
        assert x < kept[dtype, OURS] <= x + 10 * 4 * shape[-1]
        assert kept[dtype, "flax"] >= 2 * x


def test_compile_time(run_once, shape=(2, 4, 4, 4)):
    """What is compiled is a training step with all its gradients, of one layer and of a stack."""
    comparisons = run_once(compile_time)
    report = compile_time.run([OURS, "flax"], shape=shape, depth=2)
    for layers, compiled in ((1, comparisons[0]), (2, comparisons[1])):
        assert set(compiled) == {OURS, "flax"}
        for name, step in compiled.items():
            shapes = [leaf.shape for leaf in jax.tree.leaves(step.out_info)]
            # The running mean, variance (and count), and the gradients of scale and bias.
            assert shapes.count(shape[-1:]) == (5 if name == OURS else 4) * layers
            # y and x's gradient, or the gradients of the kernels.
            assert shapes.count(shape if layers == 1 else (3, 3, 4, 4)) == 2
    assert [r["what"] for r in report.rows] == ["layer"] * 2 + ["stack of 2"] * 2
    assert [(bar.value, bar.met) for bar in report.bars] == [(0.5, True)] * 2


def test_a_report_is_shown_and_saved_whole(tmp_path):
    bars = [Bar("speed", 1.5, 1.2, at_least=True), Bar("error", math.nan, 1e-6, at_least=False)]
    report = Report("layer", [{"ratio": 1.5}], [], bars)
    console = Console(record=True, width=100)
    show(report, console)
    text = console.export_text()
    assert "met" in text
    assert "missed" in text
    content = json.loads(save([report], tmp_path / "new").read_text())
    assert [bar["met"] for bar in content["suites"]["layer"]["bars"]] == [True, False]
    assert {"date", "processor", "cores", "jax", "flax"} <= set(content["environment"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bench.json"]


@pytest.mark.parametrize(("error", "verdict"), [(1e-7, True), (1.0, False)])
def test_only_accuracy_decides_the_verdict(error, verdict, monkeypatch, tmp_path):
    def fake(suite, *_):
        bar = Bar("y", error if suite == "accuracy" else 99.0, 1e-6, at_least=False)
        return Report(suite, [], [], [bar])

    monkeypatch.setattr(suites, "run_suite", fake)
    monkeypatch.setattr(suites, "save_plots", lambda *_: [])
    console = Console(quiet=True)
    options = {"turns": 2, "data_dir": None, "folder": tmp_path, "console": console}
    assert suites.run_suites(("memory", "accuracy"), **options) == verdict


def test_every_suite_has_a_name():
    assert get_args(get_type_hints(cli.COMMANDS["bench"])["suite"]) == ("all", *suites.SUITES)
    assert set(FUNCTIONAL) < set(PEERS) == set(ENTRIES)
