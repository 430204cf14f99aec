"""The network of the experiments: linear maps, each followed by a normalization and a nonlinearity.

Plain functions over trees. What differs between experiments is a function: the normalization,
`(x, params, state, train=...) -> (y, state)`, as `bn_jax.batch_norm` is, and the nonlinearity.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

import bn_jax as bn
from bn_jax.reproduce.training import Data, Run
from bn_jax.train.step import binarize

Normalize = Callable[..., tuple[Array, Any]]
Activation = Callable[[Array], Array]
IMAGE = 28 * 28
CLASSES = 10


class Params(NamedTuple):
    """What is learned.

    Attributes:
        kernels: of each linear map, [inputs, outputs].
        affine: scale and bias of each hidden layer's normalization; without one, the bias alone.
        bias: of the logits.
    """

    kernels: list[Array]
    affine: list[bn.BatchNormParams]
    bias: Array


def plain(x: Array, params: bn.BatchNormParams, state: Any, *, train: bool) -> tuple[Array, Any]:
    """No normalization: the layer's bias is added."""
    assert params.bias is not None
    return x + params.bias[None], state


def init(
    key: Array, hidden: Sequence[int], std: float | Array | None, *, normalized: bool
) -> tuple[Params, list[bn.BatchNormState]]:
    """Gaussian initial weights; from one key the same, whether the network is normalized or not.

    Args:
        key: of the weights.
        hidden: sizes of the hidden layers.
        std: of the weights, may be traced; None for √(2/inputs) (He et al. 2015).
        normalized: give the normalizations a scale; plain layers have none.
    """
    sizes = [IMAGE, *hidden, CLASSES]
    kernels = [
        jax.random.normal(key, shape) * (jnp.sqrt(2 / shape[0]) if std is None else std)
        for key, shape in zip(
            jax.random.split(key, len(sizes) - 1), itertools.pairwise(sizes), strict=True
        )
    ]
    affine, states = zip(*[bn.init(size, use_scale=normalized) for size in hidden], strict=True)
    return Params(kernels, list(affine), jnp.zeros(CLASSES)), list(states)


def forward(
    params: Params,
    states: list[Any],
    x: Float[Array, "batch inputs"],
    *,
    normalize: Normalize,
    activation: Activation,
    train: bool,
) -> tuple[Float[Array, "batch classes"], list[Any], list[Array]]:
    """Logits, new states, and what enters each nonlinearity."""
    *kernels, last = params.kernels
    new_states, entering = [], []
    for kernel, affine, state in zip(kernels, params.affine, states, strict=True):
        x, state = normalize(x @ kernel, affine, state, train=train)
        new_states.append(state)
        entering.append(x)
        x = activation(x)
    return x @ last + params.bias[None], new_states, entering


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The network with its settings, as `training` needs it.

    Attributes:
        normalize: `bn_jax.batch_norm` with its options, say, or `plain`.
        activation: the nonlinearity.
        hidden: sizes of the hidden layers.
        binarization: how grey levels become inputs.
    """

    normalize: Normalize
    activation: Activation = jax.nn.sigmoid
    hidden: tuple[int, ...] = (100, 100, 100)
    binarization: Literal["threshold", "stochastic", "none"] = "threshold"

    def make(self, key: Array, values: Mapping[str, Array]) -> tuple[Params, list[Any]]:
        """Initial parameters and states; weights of standard deviation values["init_std"]."""
        std, normalized = values.get("init_std"), self.normalize is not plain
        return init(key, self.hidden, std, normalized=normalized)

    def forward(self, params: Params, states: Any, inputs: Array, *, train: bool) -> Any:
        """Logits, new states, and what enters each nonlinearity."""
        options = {"normalize": self.normalize, "activation": self.activation}
        return forward(params, states, inputs, train=train, **options)

    def loss(self, params: Params, run: Run, images: Array, labels: Array) -> tuple[Array, Any]:
        """The mean loss of a batch, and the new states."""
        inputs = binarize(images, self.binarization, jax.random.fold_in(run.key, run.step))
        logits, states, _ = self.forward(params, run.states, inputs, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), states

    def score(self, run: Run, data: Data) -> dict[str, Array]:
        """The accuracy on the test set, by running statistics."""
        return {"accuracy": self.accuracy(run, data.test_images, data.test_labels)}

    def accuracy(self, run: Run, images: Array, labels: Array, *, train: bool = False) -> Array:
        """The share of images that are labelled rightly, by running or by batch statistics."""
        inputs = binarize(images, self.binarization, jax.random.key(0))
        logits, _, _ = self.forward(run.params, run.states, inputs, train=train)
        return jnp.mean(jnp.argmax(logits, -1) == labels)
