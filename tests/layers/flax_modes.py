"""The modes of flax's nnx, where the installed flax has them."""

import contextlib

import flax
import pytest
from flax import nnx

TREE = {"graph_mode": False, "graph_updates": False}


def set_modes(**modes):
    """A context of `graph_mode` or `graph_updates`; does nothing where flax has no such modes."""
    stack = contextlib.ExitStack()
    for name, value in modes.items():
        if set_mode := getattr(nnx, f"set_{name}", None):
            stack.enter_context(set_mode(value))
    return stack


@pytest.fixture
def graph_mode():
    """For what flax's tree mode refuses: layers used twice, `StateAxes`, gradients as a `State`."""
    with set_modes(graph_mode=True, graph_updates=True):
        yield


@pytest.fixture
def tree_mode():
    """The mode that flax plans to make its default."""
    if not hasattr(nnx, "set_graph_mode"):
        pytest.skip(f"flax {flax.__version__} has no tree mode")
    with set_modes(**TREE):
        yield
