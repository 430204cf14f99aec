"""Flax's graph mode, in which layers and parameters may be shared.

Flax plans to make tree mode the default. It refuses a model that uses a layer twice, which swapping
and folding can go through in graph mode.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from flax import nnx


def graph_mode() -> AbstractContextManager[Any]:
    """A context in which flax's functions take graphs; does nothing where flax has no other mode.

    >>> shared = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    >>> with graph_mode():
    ...     graph, state = nnx.split(nnx.Sequential(shared, nnx.relu, shared))
    """
    set_mode = getattr(nnx, "set_graph_mode", None)
    return contextlib.nullcontext() if set_mode is None else set_mode(True)
