"""Decoding needs numpy; pooch and rich are loaded when something is fetched, not before."""

import subprocess
import sys

import pytest

from bn_jax.data.cache import default_cache_dir

FETCHING = {"pooch", "rich", "requests", "urllib3"}


def loaded_by(statement):
    program = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_nothing_that_fetches():
    assert not FETCHING & loaded_by("import bn_jax.data, bn_jax.data.idx, bn_jax.data.progress")


def test_the_test_above_can_fail():
    assert {"pooch", "rich"} <= loaded_by("import bn_jax.data, pooch, rich")


def test_without_pooch_the_place_of_the_cache_is_unknown(monkeypatch):
    monkeypatch.delenv("BN_JAX_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install pooch.*BN_JAX_CACHE.*data_dir"):
        default_cache_dir()
