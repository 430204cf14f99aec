"""States on disk: they come back bit for bit, or not at all and with a reason."""

import gc
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train import checkpoint
from bn_jax.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    finished,
    load_newest,
    newest_checkpoint,
)
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import run_chunk
from bn_jax.train.progress import begin
from bn_jax.train.state import init_state
from bn_jax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("lenient")


# Where reading fails, orbax leaves coroutines behind that nobody awaits.
failing = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def build(arm="batch", **options):
    return TrainConfig(hidden=(8,), batch_size=20, **options), arm


SETTINGS = {"arm": "batch", "hidden": [8]}


def start(parts, seed=0):
    config, arm = parts
    return begin(
        init_state(config.with_values({"seed": seed}), arm, np.zeros((2, 28, 28), np.uint8))
    )


def save(folder, *states):
    with Checkpoints(folder, SETTINGS) as checkpoints:
        for state in states:
            checkpoints.save(state)


def load(folder, like):
    return load_newest(folder, like, SETTINGS)


def plain(progress):
    key = jax.random.key_data(progress.state.key)
    return progress._replace(state=progress.state._replace(key=key))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    a, b = plain(a), plain(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def at(step, seed=0):
    """A state that says it has taken so many steps."""
    progress = start(build(), seed)
    state = progress.state._replace(step=jnp.asarray(step, jnp.int32))
    return progress._replace(state=state, loss=jnp.float32(0.1), good=jnp.int32(3))


@pytest.mark.parametrize(
    ("arm", "options"),
    [
        pytest.param(
            *("batch", {"optimizer": "sgd", "weight_decay": 0.01, "schedule": "cosine"}),
            marks=pytest.mark.slow,
        ),
        ("none", {"optimizer": "momentum"}),
        ("batch", {"optimizer": "adam", "average": "ema", "binarization": "stochastic"}),
    ],
)
def test_a_state_is_all_that_is_needed_to_go_on(arm, options, tmp_path, digits):
    parts = build(arm, **options)
    step = make_train_step(*parts)
    data = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels, jnp.int32)

    def go_on(state):
        return run_chunk(step, state, *data, steps=7, batch_size=20)[0]

    middle = go_on(start(parts))
    save(tmp_path, middle)
    # Of the state that it is loaded like, only the shapes matter.
    loaded = load(tmp_path, jax.eval_shape(lambda: start(parts, seed=1)))
    assert_same(loaded, middle)
    assert_same(go_on(loaded), go_on(middle))


def test_the_newest_counts_and_two_are_kept(tmp_path):
    states = [at(step, seed) for seed, step in enumerate((5, 10, 200))]
    save(tmp_path, *states)
    assert_same(load(tmp_path, states[0]), states[-1])
    assert newest_checkpoint(tmp_path) == tmp_path / "200"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "200"]


@pytest.mark.parametrize(
    ("keep", "kept"), [("newest", "3 4"), ("best", "2 3 4"), ("all", "1 2 3 4")]
)
def test_what_is_kept(keep, kept, tmp_path):
    """By orbax's policies; also by a run that goes on. One without a score is not the best."""
    for steps in ({1: 0.5, 2: 0.9}, {3: None, 4: 0.8}):
        with Checkpoints(tmp_path, SETTINGS, since=2, keep=keep) as checkpoints:
            for step, accuracy in steps.items():
                checkpoints.save(at(step), accuracy)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept.split()
    assert_same(load_newest(tmp_path, at(0), SETTINGS, step=3), at(3))
    assert load_newest(tmp_path, at(0), SETTINGS, step=5) is None


@failing
def test_a_damaged_score_is_one_line(tmp_path):
    with Checkpoints(tmp_path, SETTINGS, keep="best") as checkpoints:
        checkpoints.save(at(5), 0.5)
    for path in tmp_path.glob("5/metrics/*"):
        path.write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be opened \(.*\); give permission, or move"):
        Checkpoints(tmp_path, SETTINGS, since=5, keep="best")
    gc.collect()


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "batch").touch()
    with pytest.raises(CheckpointError, match=r"batch cannot be opened \(.*\); give permission"):
        Checkpoints(tmp_path / "batch", SETTINGS)


def test_only_what_is_finished_counts(tmp_path):
    save(tmp_path, at(5))
    shutil.copytree(tmp_path / "5", tmp_path / "9.orbax-checkpoint-tmp")
    assert newest_checkpoint(tmp_path) == tmp_path / "5"
    assert_same(load(tmp_path, at(0)), at(5))


def test_an_error_waits_for_what_is_being_written(tmp_path):
    """So that nothing is torn by the end of the process."""

    def interrupted():
        with Checkpoints(tmp_path, SETTINGS) as checkpoints:
            checkpoints.save(at(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert newest_checkpoint(tmp_path) == tmp_path / "5"


def make_missing(folder):
    shutil.rmtree(folder, ignore_errors=True)


def make_empty(folder):
    folder.mkdir()


def make_unfinished(folder):
    save(folder, at(5))
    (folder / "5").rename(folder / "5.orbax-checkpoint-tmp")


def make_foreign(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing of orbax's")


@pytest.mark.parametrize("make", [make_missing, make_empty, make_unfinished, make_foreign])
def test_without_a_checkpoint(make, tmp_path):
    folder = tmp_path / "batch"
    make(folder)
    assert load(folder, at(0)) is None
    assert newest_checkpoint(folder) is None


@failing
@pytest.mark.parametrize(
    ("arm", "options"),
    [
        ("batch", {"hidden": (9,)}),
        ("batch", {"hidden": (8, 8)}),
        ("none", {"hidden": (8,)}),
        ("batch", {"hidden": (8,), "optimizer": "adam"}),
        ("batch", {"hidden": (8,), "average": "ema", "model": "tower", "filters": 2, "blocks": 1}),
    ],
    ids=["wider", "deeper", "without batch norm", "adam", "tower"],
)
def test_of_another_network(arm, options, tmp_path):
    save(tmp_path, at(5))
    config = TrainConfig(**options)
    like = jax.eval_shape(lambda: start((config, arm)))
    message = rf"{tmp_path / '5'} is of another version of bn_jax, .*; use that version, or train"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, like)


def test_of_another_run(tmp_path):
    save(tmp_path, at(5))
    message = (
        rf"{tmp_path / '5'} is of a run with other settings than config.json has "
        r"\(hidden, steps\); put back the run's own files"
    )
    with pytest.raises(CheckpointError, match=message):
        load_newest(tmp_path, at(0), {"arm": "batch", "hidden": [9], "steps": 4})


def test_of_before_a_setting_was_added(tmp_path):
    """Which is None where nobody asks for it."""
    save(tmp_path, at(5))
    assert_same(load_newest(tmp_path, at(0), SETTINGS | {"added": None}), at(5))


def test_of_another_format(tmp_path, monkeypatch):
    save(tmp_path, at(5))
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    # Another version has other settings too, which are not the user's doing.
    for settings in (SETTINGS, SETTINGS | {"precision": "float32"}):
        with pytest.raises(CheckpointError, match="5 is of another version of bn_jax"):
            load_newest(tmp_path, at(0), settings)


@failing
def test_what_is_damaged_is_passed_over_or_unharmed(tmp_path, caplog):
    """Every file of a checkpoint, cut short, emptied, overwritten or lost: never a wrong state."""
    state = at(5)
    save(tmp_path / "good", state)
    files = [p.relative_to(tmp_path) for p in (tmp_path / "good").rglob("*") if p.is_file()]
    damages = {
        "lost": lambda path: path.unlink(),
        "empty": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "noise": lambda path: path.write_bytes(bytes(reversed(path.read_bytes()))),
    }
    refused = set()
    for file in files:
        for name, damage in damages.items():
            copy = tmp_path / f"{file.name}-{name}"
            shutil.copytree(tmp_path / "good", copy)
            damage(copy / file.relative_to("good"))
            caplog.clear()
            if (loaded := load(copy, state)) is None:
                assert str(copy / "5") in caplog.text
                refused.add(name)
            else:
                assert_same(loaded, state)
            shutil.rmtree(copy)
    assert refused == set(damages)
    gc.collect()


@failing
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, caplog):
    """One hundred, spread over all bits of all files: of arrays, indices and names."""
    state = at(5)
    save(tmp_path, state)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size)
    noticed, random = 0, np.random.default_rng(0)
    for turn in range(100):
        path = files[turn % len(files)]
        good = path.read_bytes()
        bits = np.frombuffer(good, np.uint8).copy()
        bits[random.integers(len(bits))] ^= 1 << random.integers(8)
        path.write_bytes(bits.tobytes())
        caplog.clear()
        if (loaded := load(tmp_path, state)) is None:
            noticed += 1
            assert f"the checkpoint {tmp_path / '5'} is damaged" in caplog.text
        else:
            assert_same(loaded, state)
        path.write_bytes(good)
    assert noticed > 20
    assert_same(load(tmp_path, state), state)
    gc.collect()


@failing
def test_behind_a_damaged_checkpoint_is_the_one_before(tmp_path, caplog):
    """The damaged one is named; and a run that goes on puts it aside."""
    save(tmp_path, at(5), at(10))
    for path in (tmp_path / "10").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert_same(load(tmp_path, at(0)), at(5))
    assert f"the checkpoint {tmp_path / '10'} is damaged and passed over" in caplog.text
    with Checkpoints(tmp_path, SETTINGS, since=5) as checkpoints:
        assert finished(tmp_path) == [tmp_path / "5"]
        checkpoints.save(at(10, seed=1))
    assert len(list(tmp_path.glob("10.damaged-*"))) == 1
    assert_same(load(tmp_path, at(0)), at(10, seed=1))
    gc.collect()


def test_a_checkpoint_moves_to_another_device(tmp_path):
    """Saved on the fourth of eight devices, loaded on the first, and where there is but one."""
    with jax.default_device(jax.devices()[3]):
        state = at(5)
        assert state.state.step.devices() == {jax.devices()[3]}
        save(tmp_path / "checkpoints", state)
    loaded = load(tmp_path / "checkpoints", at(0))
    assert_same(loaded, at(5))
    assert {d for leaf in jax.tree.leaves(loaded) for d in leaf.devices()} == {jax.devices()[0]}
    script = f"""
import jax, jax.numpy as jnp, pathlib
from bn_jax.train.checkpoint import load_newest
from bn_jax.train.config import TrainConfig
from bn_jax.train.progress import begin
from bn_jax.train.state import init_state
config = TrainConfig(hidden=(8,), batch_size=20)
images = jnp.zeros((2, 28, 28), jnp.uint8)
like = jax.eval_shape(lambda: begin(init_state(config, "batch", images)))
folder = pathlib.Path({str(tmp_path / "checkpoints")!r})
print(jax.device_count(), load_newest(folder, like, {SETTINGS}).step)
"""
    command = [sys.executable, "-c", script]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.stdout.split() == ["1", "5"], done.stderr
