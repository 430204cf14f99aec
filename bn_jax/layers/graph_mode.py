"""Flax's graph mode, in which a model may use a layer or a parameter twice.

Flax plans to make its tree mode the default, which refuses such models. Swapping and folding accept
them, so they switch to graph mode.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from flax import nnx


def graph_mode() -> AbstractContextManager[Any]:
    """A context in which flax's functions run in graph mode; older flax has no other mode.

    >>> shared = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    >>> with graph_mode():
    ...     graph, state = nnx.split(nnx.Sequential(shared, nnx.relu, shared))
    """
    set_mode = getattr(nnx, "set_graph_mode", None)
    return contextlib.nullcontext() if set_mode is None else set_mode(True)
