"""Data parallel: the run on eight devices is the run on one."""

import itertools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bn_jax.data import Dataset
from bn_jax.train import scoring, sharding
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import run_chunk, train
from bn_jax.train.progress import begin
from bn_jax.train.sharding import ONE_DEVICE, make_sharding
from bn_jax.train.state import init_state
from bn_jax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("lenient")

GROUPS = (None, 8)
SMALL = {"hidden": (8, 8), "init_std": 0.3, "learning_rate": 0.5, "steps": 60, "evaluate_every": 20}


def run(data, **options):
    """The last state, and all evaluations."""
    config = TrainConfig(**SMALL | {"batch_size": 24, "devices": 8} | options)
    calls, evaluations = zip(*train(config, "batch", data), strict=True)
    return calls[-1].state, [evaluation for some in evaluations for evaluation in some]


def leaves(state):
    return jax.tree.leaves((state.params, state.batch_stats, state.opt_state, state.step))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"binarization": "stochastic", "micro_batches": 3, "optimizer": "momentum"},
    ],
    ids=["plain", "in parts"],
)
def test_eight_devices_are_one(options, digits):
    """With 237 training and 99 test images, which eight devices cannot share equally."""
    data = Dataset(*(part[: -(len(part) // 100 + 1)] for part in digits))
    one, curve = run(data, devices=None, **options)
    eight, other = run(data, **options)
    for a, b in zip(curve[1:], other[1:], strict=True):
        # Sums of 24 terms round differently by 24·2⁻²⁴ = 1.4e-6 at most; over 60 steps, each of
        # which goes its own way, that grows to √60 times as much, 1e-5.
        assert a.train_loss == pytest.approx(b.train_loss, abs=1e-5)
        assert a.test_accuracy == b.test_accuracy
    for a, b in zip(leaves(one), leaves(eight), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
        assert len(b.devices()) == 8
        assert b.is_fully_replicated


def test_each_device_holds_its_share(digits):
    mesh = make_sharding(8)
    images = mesh.examples(digits.train_images[:60])
    assert images.shape == (64, 28, 28)
    rows = [shard.data for shard in images.addressable_shards]
    assert [len(part) for part in rows] == [8] * 8
    np.testing.assert_array_equal(np.concatenate(rows)[:60], digits.train_images[:60])
    labels = mesh.examples(np.ones(10, np.int32), filler=-1)
    assert labels.sharding.spec == PartitionSpec("data")
    assert np.asarray(labels).tolist() == [1] * 10 + [-1] * 6


def test_what_fills_up_the_mesh_is_not_counted(digits, monkeypatch):
    """Of 9 test images on 8 devices, 7 are none: no label is right for them."""
    monkeypatch.setattr(scoring, "each_average", lambda *_: lambda *args: jnp.sum(args[-1] >= 0))
    few = digits._replace(test_images=digits.test_images[:9], test_labels=digits.test_labels[:9])
    _, (evaluation,) = run(few, steps=0)
    assert evaluation.test_accuracy == 1


def test_each_device_computes_its_share(digits):
    """Of the compiled step: products of 3 examples of a batch of 24, and none of all 24."""
    config = TrainConfig(hidden=(100,), batch_size=24)
    mesh = make_sharding(8)
    images = mesh.examples(digits.train_images)
    labels = mesh.examples(digits.train_labels.astype(np.int32))
    state = mesh.everywhere(init_state(config, "batch", np.zeros((2, 28, 28), np.uint8)))
    step = make_train_step(config, "batch", mesh)
    sizes = {"steps": 2, "batch_size": 24, "sharding": mesh}
    text = run_chunk.lower(step, begin(state), images, labels, **sizes).compile().as_text()
    products = re.findall(r"f32\[(\d+),100\]\S* dot\(", text)
    assert set(products) >= {"3"}
    assert "24" not in products


@pytest.mark.parametrize("devices", [None, 1])
def test_one_device_has_no_mesh(devices):
    assert make_sharding(devices) is ONE_DEVICE


@pytest.mark.parametrize(
    ("seventh", "devices", "chosen"),
    [((), None, [0, 1, 2, 3, 4, 5]), ((), 4, [0, 1, 3, 4]), ((1,), 4, [0, 1, 3, 4])],
)
def test_processes_have_equal_parts_of_the_mesh(seventh, devices, chosen, monkeypatch):
    """Of two processes with three devices each, or one more in the second."""
    owners = (0, 0, 0, 1, 1, 1, *seventh)
    present = [SimpleNamespace(process_index=owner, id=i) for i, owner in enumerate(owners)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda _: present)
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes: [d.id for d in devices])
    assert make_sharding(devices).mesh == chosen
    with pytest.raises(ValueError, match=r"--devices 3: must be a multiple of 2"):
        make_sharding(3)
    with pytest.raises(ValueError, match=r"--devices 8: JAX has 6 of kind cpu here"):
        make_sharding(8)


def test_more_devices_than_there_are(digits):
    message = r"--devices 16: JAX has 8 of kind cpu here; choose fewer, or"
    with pytest.raises(ValueError, match=message):
        run(digits, devices=16, batch_size=16)


@pytest.mark.slow
def test_the_loss_curve_of_mnist(start, finish, tmp_path):
    """By default, and with ghost batch norm over each device's share."""
    common = ("train", "--batch-size", 64, "--norm", "batch", "--steps", 500)
    common += ("--evaluate-every", 25)
    curves = {}
    for devices, group in itertools.product((1, 8), GROUPS):
        folder = tmp_path / f"{devices}-{group}"
        options = ("--group-size", group) if group else ()
        process = start(*common, *options, "--devices", devices, "--run-dir", folder, optimize=True)
        status, _, stderr = finish(process)
        assert (status, stderr) == (0, "")
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curves[devices, group] = [line["train_loss"] for line in lines][1:]
    for group in GROUPS:
        np.testing.assert_allclose(curves[8, group], curves[1, group], rtol=0, atol=1e-4)
