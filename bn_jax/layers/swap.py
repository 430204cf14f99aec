"""An existing model with our batch norms in the place of flax's, and back.

For flax.nnx, whose modules hold their values, `swap` does it in place. A flax.linen module makes
its layers when it is called, and its variables are the same for both: where it takes the
normalization as an argument, pass `bn_jax.layers.linen.BatchNorm`; where it names `nn.BatchNorm`,
change that import, or for code that is not yours, replace the name while it runs:

>>> import flax.linen as nn, jax, jax.numpy as jnp
>>> from unittest.mock import patch
>>> import bn_jax.layers.linen
>>> class Theirs(nn.Module):
...     @nn.compact
...     def __call__(self, x):
...         return nn.BatchNorm(use_running_average=False)(x)
>>> x = 1e4 + jax.random.normal(jax.random.key(0), (64, 3))
>>> variables = Theirs().init(jax.random.key(1), x)
>>> with patch("flax.linen.BatchNorm", bn_jax.layers.linen.BatchNorm):
...     y, _ = Theirs().apply(variables, x, mutable=["batch_stats"])
>>> bool(jnp.allclose(y.std(0), 1, atol=1e-3))
True
"""

import inspect
from typing import Any

from flax import nnx

from bn_jax.layers.graph_mode import graph_mode
from bn_jax.layers.nnx import BatchNorm

OURS_ALONE: dict[str, Any] = {"average": None, "unbiased": False, "group_size": None}


def swap(model: nnx.Module) -> list[str]:
    """Make every flax.nnx.BatchNorm of a model ours, in place.

    The layers stay the objects they are, and so do their variables, so that optimizers, views and
    whatever else refers to them go on; only what they do is another's. Subclasses stay as they are.

    Args:
        model: any module of flax.nnx.

    Returns:
        The paths of the layers that were swapped, e.g. ["layers.1"].

    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    >>> swap(model), type(model.layers[1]).__module__
    (['layers.1'], 'bn_jax.layers.nnx')
    """
    found = layers(model, nnx.BatchNorm)
    for layer in found.values():
        become(layer, BatchNorm)
    return list(found)


def swap_back(model: nnx.Module) -> list[str]:
    """Make every batch norm of ours flax's own again, in place; the inverse of `swap`.

    Returns:
        The paths of the layers that were swapped.

    Raises:
        ValueError: a layer has an average, unbiased or group_size, which flax's has not. No layer
            is swapped then.

    >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> swap(model) == swap_back(model), type(model.layers[0]) is nnx.BatchNorm
    (True, True)
    """
    found = layers(model, BatchNorm)
    for path, layer in found.items():
        for name, value in OURS_ALONE.items():
            if getattr(layer, name) != value:
                raise ValueError(
                    f"{path} has {name}={getattr(layer, name)}, which flax's BatchNorm cannot do; "
                    f"set it to {value} first, if the model is to go on without"
                )
    for layer in found.values():
        become(layer, nnx.BatchNorm)
    return list(found)


def layers(model: nnx.Module, kind: type) -> dict[str, Any]:
    """The modules of exactly one class, each once, by their paths."""
    with graph_mode():
        nodes = list(nnx.iter_graph(model))
    return {".".join(map(str, path)): node for path, node in nodes if type(node) is kind}


def become(layer: Any, kind: type) -> None:
    """Make a layer one of another class, as if its constructor had made it of the same settings."""
    settings = inspect.signature(kind.__init__).parameters.keys() & vars(layer).keys()
    other = kind(**{name: getattr(layer, name) for name in settings}, rngs=nnx.Rngs(0))
    for name in ("mean", "var", "scale", "bias"):
        setattr(other, name, getattr(layer, name))
    object.__setattr__(layer, "__class__", kind)  # nnx would make a note of it
    vars(layer).clear()
    vars(layer).update(vars(other))
