"""What the tests of both shells share."""

import contextlib
import subprocess
import sys
import tarfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.flax_modes import graph_mode, tree_mode  # noqa: F401 (fixtures)

UNIT = np.finfo(np.float32).eps / 2


@contextlib.contextmanager
def ordinary_rules():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def flax_rules():
    """A context manager: ordinary promotion, for flax's own layers. Ours run under strict rules."""
    return ordinary_rules


@pytest.fixture
def close():
    """Whether two computations of one value agree up to their roundings.

    Each of the two rounds about a dozen times to float32 on the way from x to a result: x - mean,
    the square, log2(m) additions of each of two sums, + epsilon, the root, the products with scale
    and rstd, + bias. Every one of these is half a unit in the last place of numbers that are no
    larger than `size`, the largest of the results or, for a sum, the sum of absolute values. So
    the two differ by no more than 2 x 16 units of size. Where the result is rounded to a coarser
    dtype, this can tip the last rounding over, which is one eps of that dtype.
    """

    def check(ours, theirs, *dtypes, size=None):
        ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
        size = np.abs(theirs).max(initial=0) if size is None else size
        eps = max((float(jnp.finfo(d).eps) for d in dtypes if d != jnp.float32), default=0)
        assert np.all(np.isfinite(theirs))
        np.testing.assert_array_less(
            np.abs(ours - theirs), eps * np.abs(theirs) + 32 * UNIT * size + 1e-30
        )

    return check


@pytest.fixture
def flax_still():
    """Fail where the installed flax no longer has a defect that our pages say it has."""

    def check(defect, shown):
        if not shown:
            pytest.fail(
                f"flax {flax.__version__} has mended defect {defect}: say so in the README's table "
                "'What is different' and in .docs/, then remove the test or name the version in it"
            )

    return check


def assert_same_tree(ours, theirs):
    """Same structure, key paths, shapes and dtypes."""

    def describe(tree):
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        return structure, [(jax.tree_util.keystr(p), a.shape, a.dtype) for p, a in leaves]

    assert describe(ours) == describe(theirs)


@pytest.fixture(scope="session")
def flax_archive(tmp_path_factory):
    """The source archive of the installed flax, which pip fetches and verifies."""
    folder = tmp_path_factory.mktemp("flax")
    # Without binaries for flax alone, as its build may need some.
    command = ["download", "--no-deps", "--no-binary", "flax", f"flax=={flax.__version__}"]
    run = [sys.executable, "-m", "pip", "--quiet", *command, "--dest", str(folder)]
    fetched = subprocess.run(run, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"pip has no source archive of flax here: {fetched.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("flax-*.tar.gz"))) as archive:
        yield archive


@pytest.fixture
def same_tree():
    return assert_same_tree
