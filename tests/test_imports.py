"""Optional dependencies are optional: each import is made in a new process and looked at."""

import subprocess
import sys

import pytest

FRAMEWORKS = {"flax", "optax", "orbax", "matplotlib", "pooch", "rich", "tyro", "torch", "haiku"}
OURS = {"bn_jax.layers", "bn_jax.data", "bn_jax.train", "bn_jax.bench", "bn_jax.cli"}
LOADED = "import sys; print(*sys.modules)"


def loaded_by(statement):
    """The names of all modules that a new interpreter has loaded after a statement."""
    command = [sys.executable, "-c", f"{statement}; {LOADED}"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import bn_jax", FRAMEWORKS | OURS),
        ("import bn_jax.core.standardize", FRAMEWORKS | OURS),
        (
            "import bn_jax.layers.linen",
            {"optax", "torch", "matplotlib", "bn_jax.train", "bn_jax.data", "bn_jax.layers.nnx"},
        ),
        ("import bn_jax.layers.nnx", {"torch", "matplotlib", "bn_jax.train", "bn_jax.data"}),
        ("import bn_jax.data.idx", {"flax", "optax", "bn_jax.train", "bn_jax.layers"}),
        ("import bn_jax.train.config", {"torch", "matplotlib", "bn_jax.bench"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_import_does_not_load(statement, forbidden):
    assert not loaded_by(statement) & forbidden


@pytest.mark.parametrize("framework", ["flax", "optax", "bn_jax.train"])
def test_the_proof_can_fail(tmp_path, framework):
    """A module that loads what it should not is seen to, also if it hides the import."""
    (tmp_path / "guilty.py").write_text(f"def hidden():\n    import {framework}\n\nhidden()\n")
    statement = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import guilty"
    assert framework in loaded_by(statement)


def test_the_command_line_says_what_it_needs(tmp_path):
    """Without the extra, `bn-jax` names it rather than show a traceback."""
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module\", name='tyro')\n")
    statement = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import bn_jax.cli"
    result = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'bn-jax[train]'" in result.stderr
    assert "Traceback" not in result.stderr
