"""The modes of flax's nnx, where the installed flax has them."""

import contextlib

from flax import nnx

TREE = {"graph_mode": False, "graph_updates": False}


def set_modes(**modes):
    """A context of `graph_mode` or `graph_updates`; does nothing where flax has no such modes."""
    stack = contextlib.ExitStack()
    for name, value in modes.items():
        if set_mode := getattr(nnx, f"set_{name}", None):
            stack.enter_context(set_mode(value))
    return stack
