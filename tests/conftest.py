"""An unforgiving JAX: eight CPU devices, no silent promotion, no silent broadcasting.

With JAX_PLATFORMS=cuda,cpu the tests of core and layers run on a GPU; those that need several
devices skip.

Warnings are errors too (see ``pyproject.toml``). What passes here passes in a user's strict
configuration. A test of code that is not ours and not strict-clean (optax's schedules, for one)
asks for the ``lenient`` fixture.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

from jaxtyping import install_import_hook

# Shapes in signatures are checked in tests only, at every call.
install_import_hook(["bn_jax.core", "bn_jax.inference.fold"], "beartype.beartype")

import hypothesis
import jax
import pytest

from tests.compiling import compile_quickly, remember_programs

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# On a GPU, JAX multiplies matrices with 10 bits of precision unless it is told otherwise.
jax.config.update("jax_default_matmul_precision", "highest")

# How long an example takes says nothing about the code: the first one compiles, machines are busy.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """Compiled programs lie in pytest's cache, which --cache-clear empties."""
    if cache := getattr(config, "cache", None):
        remember_programs(cache.mkdir("jax"))


def pytest_collectstart():
    """Modules compile while they are imported."""
    compile_quickly(True)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Tests are not searched for doctests: a test file that cannot be imported is an error.

    With --doctest-ignore-import-errors, the search would skip it and leave it half imported, and
    then its tests would not be there.
    """
    return [c for c in (yield) if type(c).__name__ != "DoctestModule"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture, as some of them compile."""
    compile_quickly(item.get_closest_marker("optimized") is None)


@pytest.fixture
def lenient():
    """Ordinary promotion rules, for third-party code that needs them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """Double precision, for oracles and finite differences."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """With BN_JAX_REQUIRE_PEERS, a comparison that was skipped has failed."""
    report = yield
    required = os.environ.get("BN_JAX_REQUIRE_PEERS") and item.get_closest_marker("peer")
    if report.skipped and required:
        report.outcome = "failed"
        report.longrepr = f"skipped, though peers are required: {report.longrepr}"
    return report
