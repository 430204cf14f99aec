"""Replace flax's batch norms in an existing model by ours, and back.

An nnx module holds its layers, so `swap` replaces them in place. A linen module makes its layers
when it is called, and its variables are the same for both. If it takes the normalization as an
argument, pass `bn_jax.layers.linen.BatchNorm`. If it names `nn.BatchNorm`, change that import. If
the code is not yours, replace the name while it runs:

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

from flax import linen, nnx

from bn_jax.layers.graph_mode import graph_mode
from bn_jax.layers.nnx import BatchNorm

OURS_ONLY: dict[str, Any] = {
    "average": None,
    "unbiased": False,
    "group_size": None,
    "renorm": None,
}
"""Settings that flax's layer lacks, with the values at which both layers do the same."""


def swap(model: nnx.Module) -> list[str]:
    """Turn every flax.nnx.BatchNorm of a model into ours, in place.

    The layers and their variables stay the same objects, so optimizers, views and other references
    to them remain valid. Subclasses of flax's layer are left alone.

    Args:
        model: any module of flax.nnx.

    Returns:
        The paths of the layers that were swapped, e.g. ["layers.1"].

    Raises:
        TypeError: the model is one of flax.linen.

    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
    >>> swap(model), type(model.layers[1]).__module__
    (['layers.1'], 'bn_jax.layers.nnx')
    """
    found = find_layers(model, nnx.BatchNorm)
    for layer in found.values():
        change_class(layer, BatchNorm)
    return list(found)


def swap_back(model: nnx.Module) -> list[str]:
    """Turn every batch norm of ours back into flax's own, in place; the inverse of `swap`.

    Returns:
        The paths of the layers that were swapped.

    Raises:
        ValueError: a layer has an average, unbiased, group_size or renorm, which flax's layer
            lacks. No layer is swapped then.

    >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> swap(model) == swap_back(model), type(model.layers[0]) is nnx.BatchNorm
    (True, True)
    """
    found = find_layers(model, BatchNorm)
    for path, layer in found.items():
        for name, value in OURS_ONLY.items():
            if getattr(layer, name) != value:
                raise ValueError(
                    f"{path} has {name}={getattr(layer, name)}, which flax's BatchNorm cannot do; "
                    f"set it to {value} first if the model can do without"
                )
    for layer in found.values():
        change_class(layer, nnx.BatchNorm)
    return list(found)


def find_layers(model: Any, kind: type) -> dict[str, Any]:
    """Path -> layer, for the layers of exactly this class; a layer used twice is listed once.

    Raises:
        TypeError: the model is one of flax.linen, which holds no layers.
    """
    if isinstance(model, linen.Module):
        raise TypeError(
            f"{type(model).__name__} is a module of flax.linen, which makes its layers when it is "
            "called: give it bn_jax.layers.linen.BatchNorm as its normalization, or change the "
            "import of BatchNorm where it is written"
        )
    with graph_mode():
        nodes = list(nnx.iter_graph(model))
    return {".".join(map(str, path)): node for path, node in nodes if type(node) is kind}


def change_class(layer: Any, kind: type) -> None:
    """Change a layer's class as if the other constructor had made it with the same settings."""
    settings = inspect.signature(kind.__init__).parameters.keys() & vars(layer).keys()
    other = kind(**{name: getattr(layer, name) for name in settings}, rngs=nnx.Rngs(0))
    for name in ("mean", "var", "scale", "bias"):
        setattr(other, name, getattr(layer, name))
    object.__setattr__(layer, "__class__", kind)  # past nnx's own __setattr__
    vars(layer).clear()
    vars(layer).update(vars(other))
