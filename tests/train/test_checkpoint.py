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

from bn_jax.train.build import build_model, build_optimizer
from bn_jax.train.checkpoint import CheckpointError, Checkpoints, load_newest, newest_checkpoint
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import run_chunk
from bn_jax.train.progress import begin
from bn_jax.train.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("lenient")


# Where reading fails, orbax leaves coroutines behind that nobody awaits.
failing = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def build(arm="batch", **options):
    config = TrainConfig(hidden=(8,), batch_size=20, **options)
    return build_model(config, arm), build_optimizer(config)


def start(parts, seed=0):
    return init_state(*parts, jnp.zeros((2, 28, 28), jnp.uint8), seed)


def save(folder, *states):
    with Checkpoints(folder) as checkpoints:
        for state in states:
            checkpoints.save(state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    a, b = (s._replace(key=jax.random.key_data(s.key)) for s in (a, b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def at(step, seed=0):
    """A state that says it has taken so many steps."""
    return start(build(), seed)._replace(step=jnp.asarray(step, jnp.int32))


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
    step = make_train_step(*parts, options.get("binarization", "threshold"))
    data = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels, jnp.int32)

    def go_on(state):
        return run_chunk(step, begin(state), *data, steps=7, batch_size=20)[0].state

    middle = go_on(start(parts))
    save(tmp_path, middle)
    # Of the state that it is loaded like, only the shapes matter.
    loaded = load_newest(tmp_path, jax.eval_shape(lambda: start(parts, seed=1)))
    assert_same(loaded, middle)
    assert_same(go_on(loaded), go_on(middle))


def test_the_newest_counts_and_two_are_kept(tmp_path):
    states = [at(step, seed) for seed, step in enumerate((5, 10, 200))]
    save(tmp_path, *states)
    assert_same(load_newest(tmp_path, states[0]), states[-1])
    assert newest_checkpoint(tmp_path) == tmp_path / "200"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "200"]


def test_only_what_is_finished_counts(tmp_path):
    save(tmp_path, at(5))
    shutil.copytree(tmp_path / "5", tmp_path / "9.orbax-checkpoint-tmp")
    assert newest_checkpoint(tmp_path) == tmp_path / "5"
    assert_same(load_newest(tmp_path, at(0)), at(5))


def test_an_error_waits_for_what_is_being_written(tmp_path):
    """So that nothing is torn by the end of the process."""

    def interrupted():
        with Checkpoints(tmp_path) as checkpoints:
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
    with pytest.raises(CheckpointError, match=r"batch holds no finished checkpoint; train again"):
        load_newest(folder, at(0))
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
    other = build_model(config, arm), build_optimizer(config)
    like = jax.eval_shape(lambda: start(other))
    message = rf"{tmp_path / '5'} cannot be read as this run's network .*config.json"
    with pytest.raises(CheckpointError, match=message):
        load_newest(tmp_path, like)
    gc.collect()


@failing
def test_what_is_damaged_is_refused_or_unharmed(tmp_path):
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
            try:
                assert_same(load_newest(copy, state), state)
            except CheckpointError as error:
                assert str(copy) in str(error)  # noqa: PT017
                refused.add(name)
            shutil.rmtree(copy)
    assert refused == set(damages)
    gc.collect()


@failing
def test_the_remedy_for_damage_works(tmp_path):
    """Without the newest folder, the one before counts."""
    save(tmp_path, at(5), at(10))
    for path in (tmp_path / "10").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"10 cannot be read .* delete that folder"):
        load_newest(tmp_path, at(0))
    shutil.rmtree(tmp_path / "10")
    assert_same(load_newest(tmp_path, at(0)), at(5))
    gc.collect()


def test_a_checkpoint_moves_to_another_device(tmp_path):
    """Saved on the fourth of eight devices, loaded on the first, and where there is but one."""
    with jax.default_device(jax.devices()[3]):
        state = at(5)
        assert state.step.devices() == {jax.devices()[3]}
        save(tmp_path / "checkpoints", state)
    loaded = load_newest(tmp_path / "checkpoints", at(0))
    assert_same(loaded, at(5))
    assert {d for leaf in jax.tree.leaves(loaded) for d in leaf.devices()} == {jax.devices()[0]}
    script = f"""
import jax, jax.numpy as jnp, pathlib
from bn_jax.train.build import build_model, build_optimizer
from bn_jax.train.checkpoint import load_newest
from bn_jax.train.config import TrainConfig
from bn_jax.train.progress import begin
from bn_jax.train.step import init_state
config = TrainConfig(hidden=(8,), batch_size=20)
parts = build_model(config, "batch"), build_optimizer(config)
like = jax.eval_shape(lambda: init_state(*parts, jnp.zeros((2, 28, 28), jnp.uint8), 0))
print(jax.device_count(), load_newest(pathlib.Path({str(tmp_path / "checkpoints")!r}), like).step)
"""
    command = [sys.executable, "-c", script]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.stdout.split() == ["1", "5"], done.stderr
