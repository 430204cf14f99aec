"""Optional dependencies are optional: importing one module loads only what it is allowed to.

Each proof runs in a process of its own: one for all files of a folder that may load the same, as
what loads nothing together loads nothing alone. A test shows that a proof can fail.
"""

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import bn_jax
import bn_jax.core
import bn_jax.interop

HEAVY = {"flax", "optax", "orbax", "matplotlib", "requests", "tyro", "rich", "torch"}
PEERS = {"torch", "keras", "tensorflow", "haiku", "equinox", "flax", "safetensors"}
FOLDERS = ("layers", "interop", "data", "train", "bench", "explain", "conform", "reproduce")
OURS = {f"bn_jax.{name}" for name in FOLDERS} | {
    "bn_jax.inference.fold_models",
    "bn_jax.inference.recalibrate",
}


def files_of(package):
    """A package and all modules in it, as they are imported."""
    names = sorted(path.stem for path in Path(package.__path__[0]).glob("[a-z]*.py"))
    return ", ".join([package.__name__, *(f"{package.__name__}.{name}" for name in names)])


# what is imported -> what must not be loaded with it: top-level packages, or modules of ours
FORBIDDEN = {
    "bn_jax": HEAVY | OURS,
    files_of(bn_jax.core): HEAVY | OURS,
    "bn_jax.inference, bn_jax.inference.fold": HEAVY | OURS,
    # converters know other libraries by the objects that are passed, and import none
    files_of(bn_jax.interop): HEAVY | PEERS | OURS - {"bn_jax.interop"},
    "bn_jax.layers": HEAVY,
    ", ".join(f"bn_jax.conform.{name}" for name in ("find", "generate", "judge")): HEAVY
    | OURS - {"bn_jax.conform"},
    "bn_jax.explain": HEAVY | OURS - {"bn_jax.explain"},
    "bn_jax.explain.models": HEAVY - {"flax", "rich", "optax"} | {"bn_jax.data", "bn_jax.train"},
    # flax itself loads rich, and its nnx optax
    "bn_jax.layers.linen": HEAVY - {"flax", "rich"} | {"bn_jax.data", "bn_jax.train"},
    "bn_jax.layers.nnx": HEAVY - {"flax", "rich", "optax"} | {"bn_jax.data", "bn_jax.train"},
    "bn_jax.inference.recalibrate": HEAVY - {"flax", "rich", "optax"}
    | {"bn_jax.data", "bn_jax.train"},
    "bn_jax.layers.fold": HEAVY - {"flax", "rich", "optax"} | {"bn_jax.data", "bn_jax.train"},
    "bn_jax.inference.fold_models": HEAVY - {"flax", "rich", "optax"}
    | {"bn_jax.data", "bn_jax.train"},
}


def loaded_by(statement, path=()):
    """The modules in a fresh interpreter after a statement."""
    program = f"import sys; sys.path[:0] = {list(path)}; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def loaded_in_vain(statement, forbidden, path=()):
    """Those of the forbidden that a statement loads, themselves or in part."""
    loaded = loaded_by(statement, path)
    return {name for name in forbidden if any(f"{m}.".startswith(f"{name}.") for m in loaded)}


@pytest.mark.parametrize("modules", FORBIDDEN, ids=lambda modules: modules.partition(",")[0])
def test_modules_load_only_what_they_may(modules):
    assert not loaded_in_vain(f"import {modules}", FORBIDDEN[modules])


def test_all_public_names_are_listed():
    shown = {name for name, value in vars(bn_jax).items() if not inspect.ismodule(value)}
    assert set(bn_jax.__all__) == {name for name in shown if not name.startswith("_")}
    text = pydoc.render_doc(bn_jax)
    assert all(name in pydoc.plain(text) for name in bn_jax.__all__)


def test_the_proof_can_fail(tmp_path):
    (tmp_path / "careless.py").write_text("import flax.struct\nimport bn_jax.layers\n")
    found = loaded_in_vain("import careless", {"flax", "bn_jax.layers", "torch"}, [str(tmp_path)])
    assert found == {"flax", "bn_jax.layers"}


def test_values_are_converted_without_their_library():
    program = "\n".join(
        [
            "import numpy as np, sys",
            "from bn_jax.interop.torch import from_torch, to_torch",
            "from bn_jax.interop.keras import to_keras",
            "from bn_jax.interop.haiku import to_haiku",
            "from bn_jax.interop.flax import to_flax",
            "ours = from_torch({'running_mean': np.zeros(2), 'running_var': np.ones(2)})",
            "to_torch(*ours), to_keras(*ours), to_haiku(*ours, ndim=2), to_flax(*ours)",
        ]
    )
    assert not loaded_in_vain(f"exec({program!r})", PEERS)


def test_a_test_file_that_cannot_be_imported_is_an_error(request):
    """Searched for doctests first, with import errors ignored, it would seem to have no tests."""
    path, folder = Path(__file__), request.node.getparent(pytest.Module).parent
    collectors = request.session.gethookproxy(path).pytest_collect_file(
        file_path=path, parent=folder
    )
    assert [type(c) for c in collectors] == [pytest.Module]
