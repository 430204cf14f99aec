"""What is not a batch norm is told in a line, and never ends the trial."""

import types

import numpy as np
import pytest

from bn_jax import cli
from bn_jax.conform import example, judge, report
from bn_jax.conform.find import examine, find


def tried(**functions):
    """What a user reads of a candidate with one function of the example replaced."""
    module = types.SimpleNamespace(**{"batch_norm": example.batch_norm} | functions)
    findings = judge.try_all(examine(module))
    return findings, "\n".join(f.detail for f in findings if f.level == "wrong")


def fails():
    raise RuntimeError("two\nlines \x1b[31mand colour")


class Foreign:
    """As a tensor that has a gradient."""

    def __array__(self, *_, **__):
        raise RuntimeError("call detach() first")


WRONG = {
    "no tuple": (lambda x, *_: x, "batch_norm must return y, mean, var; it returned ndarray"),
    "two": (lambda x, *_: (x, x[0]), "batch_norm must return y, mean, var; it returned 2"),
    "nothing": (lambda *_: None, "it returned NoneType"),
    "shape": (lambda x, *_: (x, x[:1], x[0]), "returned mean of shape (1, 4), not (4,)"),
    "rows": (
        lambda x, *_: (x, x.mean(-1), x.var(-1)),
        "mean of shape (32,), not (4,): one value per example; it normalizes over the wrong axis",
    ),
    "strings": (lambda x, *_: ("y", x[0], x[0]), "y is not an array of real numbers: TypeError"),
    "complex": (lambda x, *_: (x + 0j, x[0], x[0]), "it has dtype complex64"),
    "ragged": (lambda x, *_: ([[1], [1, 2]], x[0], x[0]), "y is not an array of real numbers"),
    "foreign": (lambda x, *_: (Foreign(), x[0], x[0]), "RuntimeError: call detach() first"),
    "NaN": (lambda x, *_: (x * np.nan, x[0], x[0]), "y is NaN or infinite in 128 of 128 places"),
    "error": (lambda *_: fails(), "batch_norm raised RuntimeError: two lines  [31mand colour"),
    "exit": (lambda *_: exit(3), "batch_norm raised SystemExit: 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_malformed_is_told_in_one_line(name):
    function, message = WRONG[name]
    findings = judge.try_all(examine(function))
    details = [f.detail for f in findings if f.vector == "mean 0" and f.level == "wrong"]
    assert len(details) == 1
    assert " ".join(message.split()) in " ".join(details[0].split())
    assert details[0].isprintable()


def test_what_is_absent_is_not_offered():
    findings, wrong = tried()
    assert not wrong
    offered = {f.call for f in findings if f.level != "not offered"}
    assert offered == {"batch_norm"}
    assert not report.is_wrong(findings)
    assert "0 wrong; 27 not offered" in report.score(findings)


def test_where_nothing_is_offered_nothing_is_right():
    def batch_norm(*_):
        raise NotImplementedError

    findings = judge.try_all(examine(batch_norm))
    assert report.score(findings).startswith("0 of 0 checks right")
    assert report.is_wrong(findings)


def test_not_implemented_is_not_offered():
    def infer(*_):
        raise NotImplementedError("not yet")

    findings, wrong = tried(infer=infer)
    assert not wrong
    assert {f.level for f in findings if f.call == "infer"} == {"not offered"}


def test_masks_are_passed_only_where_there_is_a_parameter():
    findings, _ = tried(running=lambda batches, decay: example.running(batches, decay))
    masked = [f for f in findings if f.vector == "masks"]
    assert [(f.level, f.detail) for f in masked] == [("not offered", "running with masks")]


def test_only_errors_about_values_are_refusals():
    """What is misspelt, or called wrongly, raises whatever the values are."""

    def fails(error):
        def function(*_):
            raise error

        return tried(batch_norm=function, running=function)[0]

    for error, level in ((ValueError("one value"), "right"), (TypeError("2 arguments"), "wrong")):
        levels = {f.vector: f.level for f in fails(error)}
        assert levels["1×3"] == levels["an empty batch"] == level


def test_what_is_not_installed_ends_the_trial(tmp_path, monkeypatch):
    text = "def bn(x, scale, bias, epsilon):\n    import no_such_framework.nn\n"
    (tmp_path / "needs_more.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^needs_more:bn: no_such_framework is not installed$"):
        cli.run_command(["conform", "needs_more:bn"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:f", "cannot import it: ModuleNotFoundError"),
        ("numpy:no_such", "numpy has no no_such; it has"),
        ("numpy:pi", "not a function, and has no function batch_norm"),
        ("numpy:linalg.no_such", "numpy.linalg has no no_such; it has"),
        ("numpy:ndarray", "cannot import it: TypeError"),
        ("", "cannot import it: ValueError: Empty module name"),
        ("numpy", "not a function, and has no function batch_norm"),
        ("math:atan2", "batch_norm must take (x, scale, bias, epsilon)"),
        ("folder/my_bn.py:f", "name the module as in an import, from its folder, e.g. my_bn:f"),
    ],
)
def test_a_target_that_is_not_there(target, message):
    with pytest.raises(ValueError, match=r"^\S*: ") as caught:
        find(target)
    assert message in str(caught.value)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Finds modules in the working directory; its status tells right from wrong."""
    (tmp_path / "mine_to_try.py").write_text("def bn(x, scale, bias, epsilon):\n    return x\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit('bye')")
    monkeypatch.chdir(tmp_path)
    cli.run_command(["conform", "bn_jax.conform.example"])
    assert "42 of 42 checks right" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.run_command(["conform", "mine_to_try:bn", "bn_jax.conform.example:batch_norm"])
    assert stop.value.code == 1
    assert "must return y, mean, var" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="leaves: cannot import it: SystemExit: bye"):
        cli.run_command(["conform", "leaves"])
    with pytest.raises(ValueError, match="name a batch norm"):
        cli.run_command(["conform"])
