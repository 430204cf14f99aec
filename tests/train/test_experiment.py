"""Whole runs on a small data set, in this process: what they leave, and how they end."""

import dataclasses
import io
import itertools
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bn_jax.train import evaluation, experiment
from bn_jax.train.checkpoint import CheckpointError, newest_checkpoint
from bn_jax.train.config import TrainConfig
from bn_jax.train.display import Bar, progress_bars
from bn_jax.train.evaluation import evaluate_run
from bn_jax.train.experiment import Diverged, Interrupted, run_experiment
from bn_jax.train.loop import Evaluation
from bn_jax.train.progress import begin
from bn_jax.train.run_folder import RunFolder, RunFolderError
from bn_jax.train.state import init_runs

pytestmark = pytest.mark.usefixtures("on_digits")

TINY = {"hidden": (8,), "batch_size": 20, "steps": 4, "evaluate_every": 2, "checkpoint_every": 2}

# Each value of each choice once, and every field: (flags in one run of the command line).
ALL_FLAGS = [
    {
        "model": "mlp",
        "norm": "both",
        "placement": "input",
        "hidden": (8, 3),
        "init_std": 0.05,
        "dataset": "mnist",
        "device": "auto",
        "devices": 2,
        "group_size": 5,
        "optimizer": "sgd",
        "schedule": "constant",
        "average": "ema",
        "activation": "sigmoid",
        "binarization": "none",
        "precision": "float32",
        "keep": "newest",
        "statistics": "batch",
    },
    {
        "model": "cnn",
        "norm": "batch",
        "placement": "pre-activation",
        "filters": 2,
        "dataset": "fashion-mnist",
        "optimizer": "momentum",
        "schedule": "cosine",
        "average": "debiased",
        "decay": 0.5,
        "activation": "tanh",
        "binarization": "stochastic",
        "device": "cpu",
        "weight_decay": 0.01,
        "micro_batches": 4,
        "classes_per_batch": 5,
        "precision": "bfloat16",
        "keep": "best",
        "statistics": "population",
        "renorm": (3.0, 5.0),
    },
    {
        "model": "tower",
        "norm": "batch",
        "filters": 2,
        "blocks": 1,
        "optimizer": "adam",
        "schedule": "exponential",
        "average": "cumulative",
        "binarization": "threshold",
        "learning_rate": 0.01,
        "epsilon": 0.001,
        "seed": 3,
        "max_bad_steps": 7,
        "seeds": 2,
        "keep": "all",
        "precision": "float16",
        "statistics": "running",
    },
    {"model": "mlp", "norm": "none", "hidden": (8,), "activation": "relu"},
]


def quiet():
    return Console(file=io.StringIO(), width=200)


def run(folder, **options):
    return run_experiment(TrainConfig(run_dir=folder, **TINY | options), quiet())


def records(folder):
    """The lines of metrics, as strict JSON."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def flags(options):
    """As one types them."""
    for name, value in options.items():
        yield "--" + name.replace("_", "-")
        yield from value if isinstance(value, tuple) else [value]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            options,
            id=f"{options['model']}-{options['norm']}",
            marks=[] if options["model"] == "mlp" else pytest.mark.slow,
        )
        for options in ALL_FLAGS
    ],
)
def test_every_flag(options, tmp_path, main):
    options = {"batch_size": 20, "steps": 2, "evaluate_every": 2} | options
    options |= {"checkpoint_every": 2, "run_dir": tmp_path / "run", "data_dir": tmp_path}
    device = jax.config.jax_default_device
    assert main("train", *flags(options)) == 0
    jax.config.update("jax_default_device", device)
    folder = RunFolder(tmp_path / "run")
    assert folder.read_config() == TrainConfig(**options)
    lines, config = records(folder.path), folder.read_config()
    assert [line["step"] for line in lines] == [
        step for _ in config.arms for step in (0, 2) for _ in config.all_seeds
    ]
    summary = json.loads((folder.path / "summary.json").read_text())
    for row in evaluate_run(folder):
        assert row["step"] == 2
        assert row["test_accuracy"] == summary["arms"][row["arm"]]["final_test_accuracy"]


def test_the_table_above_has_every_flag_and_every_choice():
    given = {
        "over",
        "run_dir",
        "data_dir",
        "batch_size",
        "steps",
        "evaluate_every",
        "checkpoint_every",
        "tensorboard",  # has a test of its own
    }
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert given | {name for options in ALL_FLAGS for name in options} == names
    for name, kind in typing.get_type_hints(TrainConfig).items():
        if typing.get_origin(kind) is typing.Literal and name != "device":
            tried = {options[name] for options in ALL_FLAGS if name in options}
            assert tried == set(typing.get_args(kind)), name


@pytest.fixture
def instant(monkeypatch):
    """Training takes no time and changes nothing but the step."""

    def train(config, arm, data, watch, resumed):
        start = begin(init_runs(config, arm, data.train_images[:2]))
        best = {"batch": 0.9, "none": 0.5}[arm]
        for step in (*range(0, config.steps, config.evaluate_every), config.steps):
            state = start.state._replace(step=jnp.asarray(step, jnp.int32))
            evaluation = Evaluation(step, 1 / best, best * step / config.steps, 60.0)
            yield start._replace(state=state), [evaluation]

    monkeypatch.setattr(experiment, "train", train)


def test_checkpoints_when_due_and_at_the_end(tmp_path, instant):
    """At the first evaluation 5 steps or more after the one before; two are kept."""
    saved = []

    class Recorder(experiment.Checkpoints):
        def save(self, state, *score):
            saved.append(int(state.step))
            super().save(state, *score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "Checkpoints", Recorder)
        run(tmp_path / "run", norm="none", steps=15, checkpoint_every=5)
    assert saved == [6, 12, 15]
    folder = tmp_path / "run" / "checkpoints" / "none"
    assert sorted(path.name for path in folder.iterdir()) == ["12", "15"]


def test_the_best_checkpoint_has_the_best_networks(tmp_path, monkeypatch):
    """It does not look better for the bad seed that has diverged; nor in a run that goes on."""
    scores, stop = {}, []

    def train(config, arm, data, watch, resumed):
        start = begin(init_runs(config, arm, data.train_images[:2]))
        for step in range(resumed.step + 2 if resumed else 0, 7, 2):
            if step == 6 and stop:
                raise KeyboardInterrupt
            state = start.state._replace(step=jnp.array([step, min(step, 2)], jnp.int32))
            seeds = (0, 1) if step <= 2 else (0,)
            yield (
                start._replace(state=state),
                [
                    Evaluation(step, 1.0, [0.5, 0.1][s], 60.0, diverged=s * step == 2, seed=s)
                    for s in seeds
                ],
            )

    class Recorder(experiment.Checkpoints):
        def save(self, progress, score):
            scores[progress.step] = score
            super().save(progress, score)

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "Checkpoints", Recorder)
    config = TrainConfig(run_dir=tmp_path / "run", **TINY | {"seeds": 2, "norm": "none"})
    config = dataclasses.replace(config, steps=6, keep="best")
    stop.append(True)
    with pytest.raises(Interrupted):
        run_experiment(config, quiet())
    stop.clear()
    with pytest.raises(Diverged):
        run_experiment(config, quiet(), resume=tmp_path / "run")
    assert scores == pytest.approx({2: 0.3, 4: 0.3, 6: 0.3})


def test_the_plot(tmp_path, instant):
    run(tmp_path / "run")
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"), int).reshape(-1, 3)
    assert len(pixels) > 100_000
    for arm in ((31, 119, 180), (255, 127, 14)):
        assert np.sum(np.abs(pixels - arm).sum(1) < 10) > 100


def test_what_one_sees(tmp_path, instant):
    """A live bar per arm with step, loss, accuracy and time; then the table; then where it is."""
    screen = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    config = TrainConfig(run_dir=tmp_path / "run", **TINY)
    run_experiment(config, screen)
    text = screen.file.getvalue()
    last = records(tmp_path / "run")[-1]
    for part in (
        "with batch norm",
        "without",
        "4/4",
        f"loss {last['train_loss']:.4f}",
        f"accuracy {last['test_accuracy']:.4f}",
        "0:00:0",
        "steps to 0.95",
        "steps/s",
        "without ÷ with",
        str(tmp_path / "run"),
    ):
        assert part in text, part


def test_what_one_sees_of_what_takes_long(monkeypatch):
    """The activity in place of the figures: compiling at once, the rest after a second."""
    screen = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr("time.monotonic", lambda: 107.5)
    with progress_bars(screen, TrainConfig(norm="none")) as bars:
        bar = bars["none"]
        bar.show([Evaluation(1, 0.5, 0.9, 60.0)])

        def text(activity, since):
            bar.activity, bar.since = activity, since
            with screen.capture() as capture:
                screen.print(bar.progress.get_renderable())
            return capture.get()

        assert "compiling, 0 s" in text("compiling", 107.4)
        assert "compiling, 7 s" in text("compiling", 100.5)
        assert "evaluating, 1 s" in text("evaluating", 106.2)
        known = "loss 0.5000  accuracy 0.9000"
        assert known in text("evaluating", 106.8)
        assert known in text("training", 107.0)
        assert known not in text("training", 106.0)


def test_a_bar_says_what_is_done(tmp_path, monkeypatch):
    """Before the first step is over, and never when all is over."""
    seen = []

    class Recorder(Bar):
        def watch(self, activity, step):
            seen.append(activity)
            super().watch(activity, step)

        def show(self, evaluations):
            seen.append("evaluated")
            super().show(evaluations)

    monkeypatch.setattr("bn_jax.train.display.Bar", Recorder)
    run(tmp_path / "run", norm="none")
    assert seen[:3] == ["compiling", "evaluated", "compiling"]
    assert seen[3:] == ["training", "evaluating", "evaluated"] * 2 + [None]


def test_one_arm_alone(tmp_path, instant):
    folder = run(tmp_path / "run", norm="batch")
    assert {line["arm"] for line in records(folder.path)} == {"batch"}
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["arms"].keys() == {"batch"}
    assert "steps_without_over_with" not in summary
    assert not (folder.path / "checkpoints" / "none").exists()


def test_an_arm_does_not_depend_on_the_other(tmp_path):
    both = records(run(tmp_path / "both").path)
    alone = records(run(tmp_path / "alone", norm="none").path)
    for line in (*both, *alone):
        del line["examples_per_second"]
    assert [line for line in both if line["arm"] == "none"] == alone


def test_no_steps(tmp_path):
    """Each arm is evaluated and saved as it starts; there is no loss yet, and none is shown."""
    screen = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    folder = run_experiment(TrainConfig(run_dir=tmp_path / "run", **TINY | {"steps": 0}), screen)
    assert "loss" in screen.file.getvalue()
    assert "nan" not in screen.file.getvalue()
    assert [(line["arm"], line["step"]) for line in records(folder.path)] == [
        ("batch", 0),
        ("none", 0),
    ]
    assert {row["step"] for row in evaluate_run(folder)} == {0}


def test_divergence_is_recorded_not_hidden(tmp_path):
    folder = run(tmp_path / "run", norm="none", learning_rate=1e30, activation="relu")
    losses = [line["train_loss"] for line in records(folder.path) if line["step"]]
    assert None in losses
    with Image.open(folder.path / "curves.png") as image:
        image.verify()
    assert "NaN" not in (folder.path / "summary.json").read_text()
    assert [(row["arm"], row["step"]) for row in evaluate_run(folder)] == [("none", 4)]


def test_a_taken_folder_stays_as_it_is(tmp_path, instant):
    run(tmp_path / "run", norm="none")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(RunFolderError, match=r"already holds a run"):
        run(tmp_path / "run")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_batch_larger_than_the_data_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"--batch-size 241: must be at most 240"):
        run(tmp_path / "run", batch_size=241)
    assert not (tmp_path / "run").exists()


def test_processes_compare_every_setting_but_their_own_places(tmp_path, monkeypatch):
    """Two that differ in one of them would each do something else."""
    compared = {}

    def check_same(settings):
        compared.update(settings)
        raise ValueError("compared")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(experiment, "check_same", check_same)
    with pytest.raises(ValueError, match="compared"):
        run(tmp_path / "run", batch_size=jax.device_count())
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert compared.keys() == names - {"data_dir", "run_dir", "device"}
    assert compared["checkpoint_every"] == 2
    assert compared["devices"] == jax.device_count()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def interrupt_at(step):
    """What is called with an evaluation, or with the line of it, stops at that step."""

    def stop(arm, evaluation, _):
        if evaluation.step == step and arm == "none":
            raise KeyboardInterrupt
        return "{}\n"

    return stop


@pytest.mark.parametrize(
    ("name", "stand_in", "named"),
    [
        ("train", interrupt, None),
        ("metrics_line", interrupt, None),
        ("metrics_line", interrupt_at(0), "batch/4"),
        ("metrics_line", interrupt_at(2), "batch/4"),
        ("metrics_line", interrupt_at(4), "none/2"),
        ("summarize", interrupt, "none/4"),
        ("plot_curves", interrupt, "none/4"),
    ],
)
def test_an_interrupt_names_the_last_checkpoint(
    name, stand_in, named, tmp_path, monkeypatch, instant
):
    monkeypatch.setattr(experiment, name, stand_in)
    message = rf"the last checkpoint is {tmp_path}/run/checkpoints/{named}; to go on: bn-jax train"
    with pytest.raises(Interrupted, match=message if named else "no checkpoint was due yet"):
        run(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names <= {"config.json", "metrics.jsonl", "checkpoints", "summary.json"}


def test_a_run_that_was_stopped_early_has_one_arm(tmp_path, monkeypatch, instant):
    monkeypatch.setattr(experiment, "metrics_line", interrupt_at(0))
    with pytest.raises(Interrupted):
        run(tmp_path / "run")
    rows = evaluate_run(RunFolder(tmp_path / "run"))
    assert [(row["arm"], row["step"]) for row in rows] == [("batch", 4)]


@pytest.mark.parametrize(
    ("keep", "there", "kept"),
    [
        ("newest", (14,), "14 (train with --keep all to keep every one)"),
        ("newest", (45_000, 50_000), "45,000 and 50,000 (train with --keep all to keep every one)"),
        ("all", range(2, 18, 2), "2, 4, 6, …, 12, 14 and 16"),
    ],
)
def test_a_step_without_checkpoint_gets_those_that_were_kept(keep, there, kept, tmp_path):
    folder = RunFolder.create(TrainConfig(run_dir=tmp_path / "run", keep=keep))
    for arm, step in itertools.product(("batch", "none"), there):
        (folder.checkpoints(arm) / str(step)).mkdir(parents=True)
    with pytest.raises(CheckpointError) as error:
        evaluate_run(folder, step=5)
    assert str(error.value) == f"{folder.path} has no checkpoint of step 5; it kept {kept}"


def test_a_run_that_was_stopped_at_once_has_none(tmp_path, monkeypatch, instant):
    monkeypatch.setattr(experiment, "train", interrupt)
    with pytest.raises(Interrupted):
        run(tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints" / "batch") is None
    with pytest.raises(CheckpointError, match=r"run holds no sound checkpoint; train again"):
        evaluate_run(RunFolder(tmp_path / "run"))


def test_evaluation_reads_the_data_where_it_is_told(tmp_path, monkeypatch, instant, on_digits):
    folder = run(tmp_path / "run", norm="none", data_dir=tmp_path)
    asked = []
    monkeypatch.setattr(
        evaluation, "load", lambda *_, data_dir: asked.append(data_dir) or on_digits
    )
    evaluate_run(folder)
    evaluate_run(folder, tmp_path / "elsewhere")
    assert asked == [tmp_path, tmp_path / "elsewhere"]
