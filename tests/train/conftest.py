"""Images that can be learned in a few steps, and the command line as a process of its own."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.data import Dataset


def make_digits(train: int = 240, test: int = 100) -> Dataset:
    """Noisy images; class k lights two rows of pixels of its own."""
    random = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, 10, count).astype(np.uint8)
        images = random.integers(0, 160, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 2 * label : 6 + 2 * label] = 255
        return images, labels

    return Dataset(*draw(train), *draw(test))


@pytest.fixture(scope="session")
def digits():
    return make_digits()


def fill_variables(network, inputs, seed=0):
    """Variables by numpy, none of them special: initializing by JAX compiles for seconds."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), inputs, train=False))

    def draw(path, leaf):
        name = path[-1].key
        if name in ("var", "scale"):
            return jnp.asarray(random.uniform(0.5, 2, leaf.shape), leaf.dtype)
        spread = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if name == "kernel" else 0.3
        return jnp.asarray(random.normal(0, spread, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def fill():
    return fill_variables


@pytest.fixture(scope="session")
def images():
    return np.random.default_rng(1).uniform(size=(8, 28, 28)).astype(np.float32)


@pytest.fixture
def on_digits(digits, monkeypatch, lenient):
    """In this process, experiments read `digits` instead of MNIST."""
    for module in ("experiment", "evaluation"):
        monkeypatch.setattr(f"bn_jax.train.{module}.load", lambda *_, **__: digits)
    return digits


@pytest.fixture
def main(monkeypatch):
    """Runs a command line in this process; returns its exit status."""
    jax.devices()  # JAX is in use: no command may split the CPU otherwise than in eight

    def run(*arguments) -> int:
        from bn_jax.cli import main

        monkeypatch.setattr(sys, "argv", ["bn-jax", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run


@contextmanager
def heeding_interrupts():
    """Ctrl-C works in a process that is started here, also where it does not for pytest itself.

    As in workers of pytest-xdist and in a shell's background: what is ignored is inherited.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def heeded():
    """Ctrl-C reaches this process."""
    with heeding_interrupts():
        yield


@pytest.fixture(scope="session")
def start():
    """Starts a command line in a process of its own, as a user would; it ends with the tests.

    Args:
        optimize: compile as for users, and not as quickly as can be.
        before: Python to run in the process first.
    """
    # One device, as users have: the eight are this process's.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONIOENCODING"] = "utf-8"
    processes = []

    def run(*arguments, optimize=False, before=None, **options) -> subprocess.Popen:
        program = ["-m", "bn_jax"]
        if before:
            program = ["-c", f"{before}\nfrom bn_jax.cli import main\nmain()"]
        with heeding_interrupts():
            process = subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(not optimize)},
                **options,
            )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def finish():
    """Waits for a process; returns its exit status, standard output and standard error."""

    def wait(process: subprocess.Popen) -> tuple[int, str, str]:
        stdout, stderr = process.communicate(timeout=300)
        return process.returncode, stdout, stderr

    return wait
