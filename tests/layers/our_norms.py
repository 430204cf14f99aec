"""A plugin of pytest: flax's tests with our batch norms in the place of its own.

Loaded with `-p our_norms` in a process of its own (test_flax_suite.py). Of what is collected, those
tests and docstrings stay that mention BatchNorm, or a class or function of their file that does.
"""

import ast
import importlib.util
import re
import sys
import types

import flax.linen
import flax.linen.normalization
import flax.nnx
import flax.nnx.nn.normalization
import pytest

import bn_jax.layers.linen
import bn_jax.layers.nnx

EXCEPTIONS: dict[str, str] = {}
"""Tests that fail with our layers, by the end of their ids, and why that is right. Strict: one that
passes is a failure."""


def pytest_configure(config):
    """Put ours in: not at import, since pytest imports every file of tests to find doctests."""
    put_ours_in()


def put_ours_in():
    """Our layers under flax's names."""
    for module in flax.linen, flax.linen.normalization:
        module.BatchNorm = bn_jax.layers.linen.BatchNorm
    for module in flax.nnx, flax.nnx.nn.normalization:
        module.BatchNorm = bn_jax.layers.nnx.BatchNorm
    if importlib.util.find_spec("cloudpickle") is None:  # which one test of a file needs
        sys.modules["cloudpickle"] = missing = types.ModuleType("cloudpickle")
        missing.dump = lambda *_: pytest.skip("cloudpickle is not installed")


def touching(source):
    """The tests of a file that touch batch norm, as (class or None, name)."""
    tree = ast.parse(source)
    named = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    cases = {n.name for n in named if any(name.startswith("test") for _, name in functions(n))}
    names, before = {"BatchNorm"}, set()
    while names != before:
        before = set(names)
        names |= {n.name for n in named if n.name not in cases and mentions(n, names)}
    return {
        (owner, function.name)
        for node in named
        for (owner, name), function in functions(node).items()
        if name.startswith("test") and mentions(function, names)
    }


def functions(node):
    """The functions of a top-level class, or the function itself, by (class or None, name)."""
    if isinstance(node, ast.FunctionDef):
        return {(None, node.name): node}
    return {(node.name, f.name): f for f in node.body if isinstance(f, ast.FunctionDef)}


def mentions(node, names):
    return re.search(rf"\b({'|'.join(names)})\b", ast.unparse(node)) is not None


def pytest_collection_modifyitems(items, config):
    assert flax.linen.BatchNorm is bn_jax.layers.linen.BatchNorm, "flax's own would be tested"
    found, kept = {}, []
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            keep = "BatchNorm(" in item.dtest.docstring
        else:
            if item.path not in found:
                found[item.path] = touching(item.path.read_text())
            owner = item.cls.__name__ if item.cls else None
            # absl's parameterized adds a number or a name of its own.
            keep = any(
                owner == cls and re.fullmatch(rf"{name}(\d*|_.*|\[.*)", item.name)
                for cls, name in found[item.path]
            )
        if keep:
            kept.append(item)
        for end, reason in EXCEPTIONS.items():
            if item.nodeid.endswith(end):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    items[:] = kept
