"""The command line as a newcomer tries it, in this process: help, and mistakes with a hint."""

import dataclasses
import inspect
import io
import itertools
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from bn_jax import cli
from bn_jax.commands import console
from bn_jax.hints import OTHER_NAMES, describe_flags, flag_of, guess
from bn_jax.train import settings
from bn_jax.train.build import build_model
from bn_jax.train.config import TrainConfig
from bn_jax.train.launch import Launch

GROUPS = {
    "data": settings.DataSettings,
    "model": settings.ModelSettings,
    "normalization": settings.NormalizationSettings,
    "optimizer": settings.OptimizerSettings,
    "run": settings.RunSettings,
    "launch": Launch,
}

MISTAKES = {
    "trian": "trian: no such command; did you mean train?",
    "predict": f"predict: no such command; choose one of {', '.join(cli.COMMANDS)}",
    "--steps 5": f"--steps: a command comes first, one of {', '.join(cli.COMMANDS)}",
    "train --lr 0.1": "--lr 0.1: bn-jax train has no --lr; did you mean --learning-rate?",
    "train --lr=0.1": "--lr 0.1: bn-jax train has no --lr; did you mean --learning-rate?",
    "train --learning_rte 1": "--learning-rte 1: bn-jax train has no --learning-rte; did you mean "
    "--learning-rate?",
    "train --gpu": "--gpu: bn-jax train has no --gpu; did you mean --device gpu?",
    "train --zzz": "--zzz: bn-jax train has no --zzz; see bn-jax train --help",
    "train --epochs 5": "--epochs 5: bn-jax train has no --epochs; did you mean --steps 5000? "
    "1 epoch is 1,000 steps of 60 examples",
    "train --batch-size 128 --epochs 5": "--epochs 5: bn-jax train has no --epochs; did you mean "
    "--steps 2344? 1 epoch is 469 steps of 128 examples",
    "train --epochs many": "--epochs many: bn-jax train has no --epochs; did you mean --steps? "
    "1 epoch is 1,000 steps of 60 examples",
    "train --momentum 0.9": "--momentum 0.9: bn-jax train has no --momentum; did you mean "
    "--optimizer momentum (SGD with momentum 0.9), or batch norm's --decay (the weight of the "
    "past; torch's momentum is 1 - decay)?",
    "train --hidden": "--hidden: must be integers, as in --hidden 100 100 100",
    "train --hidden --steps 5": "--hidden: must be integers, as in --hidden 100 100 100",
    "train --hidden 100,50": "--hidden 100,50: must be integers, as in --hidden 100 50",
    "train --hidden ten": "--hidden ten: must be integers, as in --hidden 100 100 100",
    "train --model tower --activation sigmoid": "--activation: has no effect with --model tower; "
    "only mlp and cnn use it",
    "train --model=tower --hidden=9": "--hidden: has no effect with --model tower; only the mlp "
    "uses it",
    "train --model cnn --blocks 2": "--blocks: has no effect with --model cnn; only the tower "
    "uses it",
    "train --filters 16": "--filters: has no effect with --model mlp; only cnn and tower use it",
    "train --norm none --group_size 10": "--group-size: has no effect with --norm none",
    "train --norm none --decay 0.99": "--decay: has no effect with --norm none",
    "train --average cumulative --decay 0.99": "--decay: has no effect with --average cumulative, "
    "which weighs all steps alike",
    "train --coordinator here": "--coordinator 'here': must be HOST:PORT, e.g. 127.0.0.1:7788",
    "train --processes 2 --process-id 2": "--process-id 2: must be from 0 to 1, one for each "
    "process",
    "train --decay -1": "--decay -1.0: must be between 0 and 1",
    "sweep": "--over: must be given, e.g. --over learning-rate=0.05,0.15,0.5",
    "sweep --over decay=0.9 --decay 0.9": "--decay: has no effect with --over; its values come "
    "from there",
    "sweep --over decay=0.9 --norm none": "--decay: has no effect with --norm none",
    "sweep --over decay=0.9,2": "--decay 2.0: must be between 0 and 1",
    "evaluate --run runs/a": "--run runs/a: bn-jax evaluate has no --run; give the run's folder "
    "without a flag: bn-jax evaluate RUN",
    "explain --run-dir a": "--run-dir a: bn-jax explain has no --run-dir; give the run's folder "
    "without a flag: bn-jax explain RUN",
    "train --renorm 3": "--renorm 3: must be two numbers, R_MAX D_MAX, as in --renorm 3 5",
    "train --renorm 3,5": "--renorm 3,5: must be two numbers, R_MAX D_MAX, as in --renorm 3 5",
    "train --model=resnet": "--model resnet: must be one of mlp, cnn, tower",
    "sweep --over lr=0.1,0.2": "--over lr=0.1,0.2: there is no lr to sweep; did you mean "
    "learning-rate?",
    "sweep --over lerning-rate=1": "--over lerning-rate=1: there is no lerning-rate to sweep; did "
    "you mean learning-rate?",
    "sweep --over steps=1,2": "--over steps=1,2: there is no steps to sweep; choose one of "
    "learning-rate, init-std, decay, epsilon, weight-decay, r-max, d-max",
    "sweep --over learning-rate=0.1,abc": "--over learning-rate=0.1,abc: abc is not a number, such "
    "as 0.1 or 1e-3",
    "sweep --over decay=0.9 --over init-std=1": "--over: give it once, e.g. --over "
    "learning-rate=0.1,0.3 decay=0.9,0.99",
    "sweep --over decay": "--over decay: must be NAME=NUMBER,…, as in learning-rate=0.1,0.3",
    "sweep --over decay=0.9,0.9": "--over decay=0.9,0.9: must be NAME=NUMBER,NUMBER,… with NAME "
    "one of learning-rate, init-std, decay, epsilon, weight-decay, r-max, d-max",
    "evaluate --statistics popular runs/a": "--statistics popular: must be one of running, "
    "population, batch; did you mean population?",
    "evaluate runs/a --statistics None": "--statistics None: must be one of running, population, "
    "batch",
    "reproduce --list": "--list: bn-jax reproduce has no --list; see bn-jax reproduce --help",
    "reproduce --claims shift": "--claims shift: bn-jax reproduce has no --claims; give the claim "
    "without a flag: bn-jax reproduce CLAIM",
    "conform --target a:b": "--target a:b: bn-jax conform has no --target; give the batch norm "
    "without a flag: bn-jax conform MODULE:FUNCTION",
    "bench --suite acuracy": "--suite acuracy: must be one of all, accuracy, layer, train-step, "
    "memory, compile, scaling, fold; did you mean accuracy?",
    "bench --suites layer": "--suites layer: bn-jax bench has no --suites; did you mean --suite?",
    "bench --suite memory --turns 3": "--turns: has no effect with --suite memory, which measures "
    "no time",
    "bench --suite fold --data-dir a": "--data-dir: has no effect with --suite fold; only "
    "train-step uses it",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_a_hint(line, main, capsys):
    assert main(*line.split()) == 2
    assert capsys.readouterr() == ("", f"error: {MISTAKES[line]}\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --steps 1e5", "--steps: 1e5 is not a whole number; did you mean 100000?"),
        (
            "train --group-size 5,000",
            "--group-size: 5,000 is not a whole number; did you mean 5000?",
        ),
        ("train --devices all", "--devices: all is not a whole number"),
        ("train --init-std 0,1", "--init-std: 0,1 is not a number, such as 0.1 or 1e-3"),
    ],
)
def test_a_number_that_is_none(line, words, main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(*line.split()) == 2
    text = capsys.readouterr().err
    assert f"Error parsing {words} " in text
    assert "None" not in text


def test_every_other_name_leads_to_a_flag():
    known = {flag for command in cli.COMMANDS.values() for flag in describe_flags(command)}
    assert {meant.split()[0] for meant in OTHER_NAMES} <= known
    for command in cli.COMMANDS.values():
        flags = describe_flags(command)
        for meant, others in OTHER_NAMES.items():
            if meant.split()[0] in flags:
                hints = [guess(f"--{other}", "", flags, {}) for other in others.split()]
                assert all(hint and "--" in hint for hint in hints)
                assert f"did you mean {meant}?" in hints
                assert not {f"--{other}" for other in others.split()} & set(flags)


CHANGED = {
    "hidden": (7,),
    "filters": 3,
    "blocks": 3,
    "activation": "tanh",
    "placement": "input",
    "average": "ema",
    "decay": 0.5,
    "epsilon": 0.1,
    "group_size": 5,
    "renorm": (3.0, 5.0),
    "precision": "float16",
}


@pytest.mark.parametrize("model", ["mlp", "cnn", "tower"])
@pytest.mark.parametrize("average", ["debiased", "cumulative"])
def test_what_is_unused_is_what_changes_no_network(model, average):
    """With batch norm, each setting of network and normalization is used, or is said not to be."""
    config = TrainConfig(model=model, average=average, norm="batch")
    for name, value in CHANGED.items():
        if (model, name) == ("tower", "placement"):
            continue  # refused
        both = (config, dataclasses.replace(config, **{name: value}))
        networks = [build_model(c, "batch") for c in both]
        same = repr(networks[0]) == repr(networks[1])
        assert same == (name in config.unused), name
    fields = {*GROUPS["model"].__dataclass_fields__, *GROUPS["normalization"].__dataclass_fields__}
    hidden = {"init_std", "statistics"}  # which no repr shows
    assert fields == {*CHANGED, "model", "norm", *hidden}


def test_a_grid_of_runs_with_several_averages_each(main, monkeypatch):
    started = []
    monkeypatch.setattr("bn_jax.commands.training.start", lambda config, *_: started.append(config))
    assert main("sweep", "--over", "learning-rate=1,2", "--decay", 0.5, 0.9) == 0
    assert main("train", "--decay", 0.5, "--renorm", 3, 5) == 0
    grid, run = started
    assert (len(grid.runs), grid.decays) == (2, 2)
    assert (run.decay, run.renorm) == (0.5, (3.0, 5.0))


def test_what_an_older_run_recorded_is_read():
    """A run's folder has every setting, used or not."""
    config = TrainConfig.from_json('{"model": "tower", "activation": "tanh", "hidden": [9]}')
    assert config.unused.keys() >= {"activation", "hidden"}


@pytest.mark.parametrize("arguments", [["--help"], ["help"], []])
def test_help_has_every_command(arguments, main, capsys):
    assert main(*arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: bn-jax COMMAND")
    assert re.findall(r"^  (\w+)", text, re.MULTILINE) == list(cli.COMMANDS)


def test_versions(main, capsys):
    assert main("--version") == 0
    assert re.match(r"bn-jax [\d.]+ \(jax [\d.]+, flax [\d.]+, ", capsys.readouterr().out)


@pytest.fixture
def read_help(main, monkeypatch):
    """What a terminal of some columns shows for --help; pytest's own capture gets no boxes."""

    def read(command, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
            assert main(command, "--help") == 0
            return sys.stdout.buffer.getvalue().decode()

    return read


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_easy_to_read(command, columns, read_help):
    """It fits, without internals, and a line ends only where the next word did not fit."""
    text = read_help(command, columns)
    assert text.startswith(f"usage: bn-jax {command}")
    assert max(map(len, text.splitlines())) <= columns
    for spoiled in ("None", "Args:", "Attributes:", "Raises:", "--no-"):
        assert spoiled not in text
    lines = [line[2:-2].rstrip() for line in text.splitlines() if line.startswith("│")]
    wrapped = 0
    for line, following in itertools.pairwise(lines):
        if re.match(" {15,}", following) and re.match(r" {15,}|--\S+ \S+ {2,}", line):
            wrapped += 1
            assert len(line) + 1 + len(following.split()[0]) > columns - 4, line
    assert wrapped or columns > 80


def test_help_has_every_flag_in_its_group(read_help):
    boxes = read_help("train", 80).split("╭─ ")[1:]
    assert [box.split(" options")[0] for box in boxes[1:]] == list(GROUPS)
    for box, group in zip(boxes[1:], GROUPS.values(), strict=True):
        flags = re.findall(r"^│ (--[\w-]+)", box, re.MULTILINE)
        assert flags == [flag_of(name) for name in group.__dataclass_fields__]
        text = " ".join(box.replace("│", " ").split())
        documented = inspect.getdoc(group).partition("Attributes:\n")[2].partition("\n\n")[0]
        entries = re.split(r"\n    (?=\w)", "\n" + documented)[1:]
        assert [entry.partition(":")[0] for entry in entries] == list(group.__dataclass_fields__)
        for entry in entries:
            assert f"{' '.join(entry.split()).partition(': ')[2]} (" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --device tpu", "loading JAX"),
        ("evaluate nowhere", "scoring the test set"),
        ("explain nowhere", "comparing"),
    ],
)
def test_the_first_seconds_say_what_happens(line, words, main, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(console, "stdout", Console(file=shown, force_terminal=True))
    assert main(*line.split()) == 2
    assert words in shown.getvalue()


def test_a_reader_that_leaves_is_no_error():
    """`bn-jax train --help | head -1`."""
    program = [sys.executable, "-m", "bn_jax", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""
