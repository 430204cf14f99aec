"""Faults of the machine under a real run: kills, a full disk, a disk that turns read-only."""

import os
import random
import subprocess
import time

import pytest

from bn_jax.train.config import TrainConfig
from bn_jax.train.run_folder import RunFolder, RunFolderError
from tests.train.test_interrupt import needs_signals, wait_until
from tests.train.test_resume import assert_same_end

pytestmark = [needs_signals, pytest.mark.usefixtures("lenient")]

SHORT = ("--batch-size", 20, "--norm", "batch", "--evaluate-every", 50)
SHORT += ("--checkpoint-every", 50)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own; returns its folder and a function that mounts it anew."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=False)
        return done.returncode == 0

    if os.geteuid() or not mount("size=1m"):
        pytest.skip("needs to be root, and allowed to mount")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_grid_that_is_killed_goes_on(start, finish, tmp_path):
    """And no second process may train in its folder while it does."""
    grid = ("sweep", "--over", "learning-rate=0.1,0.5", "--seeds", 2, "--hidden", 10, *SHORT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finish(start(*grid, "--steps", 1000, "--run-dir", whole))[::2] == (0, "")
    process = start(*grid, "--steps", 1000, "--run-dir", parts)
    wait_until((parts / "metrics.jsonl").exists, process)
    message = f"{parts}: another process is training there; wait until it ends, or stop it"
    with pytest.raises(BlockingIOError, match=message), RunFolder(parts).locked():
        raise AssertionError("both are in")
    time.sleep(random.Random(0).uniform(0, 1))
    process.kill()
    finish(process)
    assert finish(start("train", "--resume", parts))[::2] == (0, "")
    assert_same_end(whole, parts)


@pytest.mark.slow
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(start, finish, disk, tmp_path):
    """Two checkpoints of 400 kB fit on it, and a third does not."""
    folder, mount = disk
    run = ("train", *SHORT, "--steps", 250)
    status, _, stderr = finish(start(*run, "--run-dir", folder / "run"))
    assert status == 2
    assert "; make room, or choose another --run-dir; the last good one is " in stderr
    assert "Traceback" not in stderr
    assert mount("ro,size=5m")
    status, _, stderr = finish(start("train", "--resume", folder / "run"))
    assert status == 2
    assert "cannot be written (Read-only file system); make room or give permission" in stderr
    assert mount("rw,size=5m")
    assert finish(start("train", "--resume", folder / "run"))[::2] == (0, "")
    assert finish(start(*run, "--run-dir", tmp_path / "whole"))[::2] == (0, "")
    assert_same_end(tmp_path / "whole", folder / "run")


@pytest.mark.parametrize("given", [False, True])
def test_a_folder_without_permission(given, tmp_path, monkeypatch):
    """As a user whom permissions bind, which root is not."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(RunFolderError, match=r"cannot be written \(Permission denied\); make"):
            RunFolder.create(TrainConfig(run_dir=tmp_path / "run" if given else None))
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)
    assert not list(tmp_path.iterdir())
