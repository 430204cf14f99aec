"""Flax's own tests, docstrings and guides that touch batch norm, with our layers put in.

All is of the version that is installed; tests and guides come from its source archive. What touches
batch norm is found, not listed: `our_norms.py`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
DOCSTRINGS = (
    "flax.linen.normalization",
    "flax.linen.summary",
    "flax.nnx.module",
    "flax.nnx.nn.normalization",
    "flax.nnx.summary",
)
NO_GUIDES = {"api_reference", "examples", "flip", "hijax"}
"""Pages without code of their own, that fetch data, on what may come, or on a switch for all."""


@pytest.fixture(scope="module")
def folder(flax_archive, tmp_path_factory):
    """Flax's source archive, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    flax_archive.extractall(folder, filter="data")
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def python(*arguments, **environment):
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
    )


def passed(run):
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    return int(re.search(r"(\d+) passed", run.stdout)[1])


def with_batch_norm(folder, *patterns):
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in files if path.is_file() and "BatchNorm" in path.read_text("utf-8")]


def test_its_tests(folder):
    files = with_batch_norm(folder, "*/tests/linen/**/*_test.py", "*/tests/nnx/**/*_test.py")
    options = ["-p", "our_norms", "-p", "no:cacheprovider", "-q", "-c", folder / "pytest.ini"]
    run = python("-m", "pytest", *options, "--import-mode=importlib", *files)
    assert passed(run) > 100


def test_its_docstrings(folder):
    options = ["-p", "our_norms", "-p", "no:cacheprovider", "-q", "-c", folder / "pytest.ini"]
    options += ["--doctest-modules", "-o", "doctest_optionflags=NORMALIZE_WHITESPACE ELLIPSIS"]
    run = python("-m", "pytest", *options, "--pyargs", *DOCSTRINGS)
    assert passed(run) > 5


def test_its_guides(folder, tmp_path):
    """A block that raises with our layers raises the same with flax's."""
    pages = with_batch_norm(folder, "*/docs/**/*.rst", "*/docs*/**/*.md", "*/docs_nnx/**/*.rst")
    pages = [page for page in pages if not NO_GUIDES & set(page.parts)]

    def results(ours, pages):
        script = HERE / "guides.py"
        run = python(script, ours, tmp_path / "out", *pages, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        assert run.returncode == 0, run.stderr[-2000:]
        said = json.loads((tmp_path / "out").read_text())
        assert said["tested"].startswith("bn_jax" if ours else "flax")
        return said["results"]

    ours = results(1, pages)
    some_failed = {name.split()[0] for name, result in ours.items() if result["failed"]}
    theirs = results(0, sorted(some_failed))
    assert {name: ours[name] for name in theirs} == theirs
    assert sum(result["good"] > 0 for result in ours.values()) > 10
