"""The first cell of every lesson, in a kernel that runs already and lacks the package."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
USE = "import bn_jax, bn_jax.train.models; from bn_jax.data import load; print(bn_jax.__file__)"


def first_code(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def run_here(source: str) -> None:
    exec(compile(source, "<install cell>", "exec"), {})


@pytest.fixture
def nothing_installed(monkeypatch):
    """Commands that the cell would run, where no package is installed."""
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    commands = []
    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return commands


def test_lessons_begin_alike():
    assert len({first_code(path) for path in NOTEBOOKS}) == 1


def test_installs_nothing_where_all_is_installed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran a command"))
    run_here(first_code(NOTEBOOKS[0]))


def test_installs_the_checkout_around_it(monkeypatch, nothing_installed):
    monkeypatch.chdir(ROOT / "notebooks")
    run_here(first_code(NOTEBOOKS[0]))
    [pip] = nothing_installed
    assert pip[0] == sys.executable
    assert pip[-2:] == ["-e", f"{ROOT}[train]"]
    assert str(ROOT) in sys.path


def test_clones_elsewhere(monkeypatch, nothing_installed, tmp_path):
    monkeypatch.chdir(tmp_path)
    source = first_code(NOTEBOOKS[0])
    with pytest.raises(ValueError, match="Set REPOSITORY"):
        run_here(source)
    run_here(source.replace("URL-OF-THIS-REPOSITORY", "https://host.test/bn-jax"))
    clone, pip = nothing_installed
    assert clone[:2] == ["git", "clone"]
    assert "https://host.test/bn-jax" in clone
    assert pip[-1] == f"{clone[-1]}[train]"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The python of a new environment with a kernel in it and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "ipykernel"], check=True)
    kernel = folder / "kernels" / "fresh"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "fresh", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The working tree, committed in a repository of its own."""
    folder = tmp_path_factory.mktemp("origin") / "repository"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("bn_jax", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@host.test"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    return folder


def where_a_kernel_finds_it(source: str, folder: Path, python: Path, monkeypatch) -> Path:
    """Run the cell, then import the package in the same kernel: the file that was imported."""
    kernels = python.parents[2]
    monkeypatch.setenv("JUPYTER_PATH", os.fspath(kernels))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = new_notebook(cells=[new_code_cell(source), new_code_cell(USE)])
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="fresh", resources={"metadata": {"path": folder}}
    )
    client.execute()
    return Path(notebook.cells[1].outputs[-1].text.splitlines()[-1])


@pytest.mark.slow
def test_fresh_kernel(fresh, checkout, tmp_path, monkeypatch):
    """From the notebook's folder, and then from elsewhere by a clone."""
    source = first_code(NOTEBOOKS[0])
    found = where_a_kernel_finds_it(source, checkout / "notebooks", fresh, monkeypatch)
    assert found == checkout / "bn_jax" / "__init__.py"

    for number, address in enumerate([f"file://{checkout}", os.fspath(checkout)]):
        subprocess.run([fresh, "-m", "pip", "uninstall", "-q", "-y", "bn-jax"], check=True)
        elsewhere = tmp_path / str(number)
        elsewhere.mkdir()
        told = source.replace("URL-OF-THIS-REPOSITORY", address)
        found = where_a_kernel_finds_it(told, elsewhere, fresh, monkeypatch)
        assert found == elsewhere / "bn-jax-checkout" / "bn_jax" / "__init__.py"
