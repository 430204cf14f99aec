"""Decoding needs numpy; requests and rich are loaded when something is fetched, not before."""

import subprocess
import sys

import pytest

from bn_jax.data.load import default_cache_dir

FETCHING = {"platformdirs", "rich", "requests", "urllib3"}


def loaded_by(statement):
    program = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_nothing_that_fetches():
    assert not FETCHING & loaded_by("import bn_jax.data")


def test_the_test_above_can_fail():
    assert {"requests", "rich"} <= loaded_by("import bn_jax.data, requests, rich")


def test_without_platformdirs_the_place_of_the_cache_is_unknown(monkeypatch):
    monkeypatch.delenv("BN_JAX_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(ImportError, match=r"pip install platformdirs.*BN_JAX_CACHE.*data_dir"):
        default_cache_dir()
