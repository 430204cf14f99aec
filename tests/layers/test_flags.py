"""Under flax's flags: our nnx layer works wherever flax's own does, and computes the same.

Flax plans to change two defaults: tree mode for graph mode, and variables that JAX itself carries
through its transforms (hijax). The installed flax may not have them yet.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from bn_jax.layers.nnx import BatchNorm
from tests.layers.draws import normal
from tests.layers.flax_modes import TREE, set_modes

X = normal((8, 5), 3, 2)
MODES = hasattr(nnx, "set_graph_mode")
FLAGS = {
    "tree mode": lambda: set_modes(**TREE),
    "simple graphs": lambda: set_modes(graph_mode=True, graph_updates=False),
    "hijax variables": lambda: nnx.var_defaults(hijax=True),
}


def loss(layer, x):
    return (jnp.sin(layer(x)) * x).sum()


def split_and_merge(layer, x):
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def inside(params, rest, x):
        inside = nnx.merge(graph, params, rest, copy=True)
        return loss(inside, x), nnx.state(inside, nnx.BatchStat)

    gradients, stats = jax.grad(inside, has_aux=True)(params, rest, x)
    nnx.update(layer, stats)
    return gradients


PROGRAMS = {
    "eager": lambda layer, x: layer(x),
    "nnx.jit": nnx.jit(lambda layer, x: layer(x)),
    "nnx.grad": nnx.grad(loss),
    "nnx.remat": lambda layer, x: nnx.remat(lambda layer, x: layer(x))(layer, x),
    "nnx.scan": lambda layer, x: nnx.scan(
        lambda layer, x: (layer, layer(x)), in_axes=(nnx.Carry, 0)
    )(layer, x[None])[1],
    "jax.jit": lambda layer, x: jax.jit(lambda layer, x: layer(x))(layer, x),
    "split and merge": split_and_merge,
}


def outcome(program, make, evaluate):
    """What a program returns and leaves in the layer, or the exception that it raises."""
    layer = make(5, momentum=0.9, use_running_average=evaluate, rngs=nnx.Rngs(0))
    try:
        result = PROGRAMS[program](layer, X)
        return [
            *map(jnp.asarray, jax.tree.leaves(nnx.as_pure(result))),
            layer.mean[...],
            layer.var[...],
        ]
    except Exception as error:
        return error


@pytest.mark.skipif(not MODES, reason="this flax has no such flags")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("flag", FLAGS)
def test_ours_works_where_flax_does(flag, program, flax_rules, close):
    for evaluate in False, True:
        with FLAGS[flag]():
            with flax_rules():
                theirs = outcome(program, nnx.BatchNorm, evaluate)
            ours = outcome(program, BatchNorm, evaluate)
        if isinstance(theirs, Exception):
            assert flag == "hijax variables", theirs  # flax's own trains there only eagerly
        else:
            assert not isinstance(ours, Exception), ours
            for mine, other in zip(ours, theirs, strict=True):
                close(mine, other, size=float(abs(X).sum()))  # gradients are sums over x


@pytest.mark.slow
@pytest.mark.skipif(not MODES, reason="this flax has no tree mode")
def test_all_tests_of_the_layers_pass_in_tree_mode():
    variables = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    tests = Path(__file__).parents[1]
    folders = [str(tests / name) for name in ("layers", "inference")]
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow"]  # else it would run itself
    command = [sys.executable, "-m", "pytest", *options, *folders]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
