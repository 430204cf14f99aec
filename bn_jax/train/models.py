"""The networks, with the normalization as an argument.

A `Normalization` makes a module when called with `use_running_average`, as
`functools.partial(BatchNorm, momentum=0.9)` does; None leaves it out. A new normalizer joins by
being one; no network changes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
from jax import Array

from bn_jax.train.convolution import convolve

Normalization = Callable[..., nn.Module]
Activation = Callable[[Array], Array]
Placement = Literal["pre-activation", "input"]
Initializer = jax.nn.initializers.Initializer
Conv = functools.partial(nn.Conv, conv_general_dilated=convolve)

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def normalize(x: Array, normalization: Normalization | None, train: bool) -> Array:
    """X through a new normalization module of the calling module, or as it is without one."""
    return x if normalization is None else normalization(use_running_average=not train)(x)


class NormalizedLayer(nn.Module):
    """A linear map, a normalization and a nonlinearity.

    z = g(BN(Wu)) before the nonlinearity, without a bias, whose role is β's (Ioffe & Szegedy 2015,
    section 3.2); z = g(W BN(u) + b) on the input; z = g(Wu + b) without normalization.

    Attributes:
        linear: makes the linear map W when called with `use_bias`.
        activation: g.
        normalization: BN, or None.
        placement: where BN stands.
    """

    linear: Callable[..., nn.Module]
    activation: Activation
    normalization: Normalization | None = None
    placement: Placement = "pre-activation"

    @nn.compact
    def __call__(self, u: Array, train: bool) -> Array:
        """The layer's output z."""
        if self.placement == "input":
            u = normalize(u, self.normalization, train)
            return self.activation(self.linear(use_bias=True)(u))
        z = self.linear(use_bias=self.normalization is None)(u)
        return self.activation(normalize(z, self.normalization, train))


class MLP(nn.Module):
    """The fully connected network of section 4.1; normalizes hidden layers, not the logits.

    Attributes:
        hidden: sizes of the hidden layers.
        classes: number of logits.
        activation, normalization, placement: of each hidden layer.
        kernel_init: initial weights.
    """

    hidden: Sequence[int] = (100, 100, 100)
    classes: int = 10
    activation: Activation = nn.sigmoid
    normalization: Normalization | None = None
    placement: Placement = "pre-activation"
    kernel_init: Initializer = nn.initializers.normal(0.04)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Images [batch, height, width] -> logits [batch, classes]."""
        x = images.reshape(len(images), -1)
        for size in self.hidden:
            dense = functools.partial(nn.Dense, size, kernel_init=self.kernel_init)
            layer = NormalizedLayer(dense, self.activation, self.normalization, self.placement)
            x = layer(x, train)
        return nn.Dense(self.classes, kernel_init=self.kernel_init)(x)


class CNN(nn.Module):
    """Two 3×3 convolutions, each followed by 2×2 pooling, and a hidden dense layer.

    Attributes:
        filters: feature maps of the first convolution; the second has twice as many.
        classes: number of logits.
        activation, normalization, placement: of each hidden layer.
        kernel_init: initial weights.
    """

    filters: int = 16
    classes: int = 10
    activation: Activation = nn.relu
    normalization: Normalization | None = None
    placement: Placement = "pre-activation"
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Images [batch, height, width] -> logits [batch, classes]."""
        layer = functools.partial(
            NormalizedLayer,
            activation=self.activation,
            normalization=self.normalization,
            placement=self.placement,
        )
        x = images[..., None]
        for filters in (self.filters, 2 * self.filters):
            conv = functools.partial(Conv, filters, (3, 3), kernel_init=self.kernel_init)
            x = nn.max_pool(layer(conv)(x, train), (2, 2), strides=(2, 2))
        dense = functools.partial(nn.Dense, 128, kernel_init=self.kernel_init)
        x = layer(dense)(x.reshape(len(x), -1), train)
        return nn.Dense(self.classes, kernel_init=self.kernel_init)(x)


class ResidualBlock(nn.Module):
    """conv → BN → ReLU → conv → BN → add the input → ReLU (Silver et al. 2017, Methods)."""

    filters: int
    normalization: Normalization | None = None
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Feature maps [batch, height, width, filters] -> the same shape."""
        conv = functools.partial(Conv, self.filters, (3, 3), kernel_init=self.kernel_init)
        residual = NormalizedLayer(conv, nn.relu, self.normalization)(x, train)
        residual = conv(use_bias=self.normalization is None)(residual)
        return nn.relu(x + normalize(residual, self.normalization, train))


class Tower(nn.Module):
    """AlphaGo Zero's trunk: a convolution block and then residual blocks (Silver et al. 2017).

    Attributes:
        filters: feature maps of every convolution; 256 in the paper.
        blocks: residual blocks; 19 or 39 in the paper.
        normalization: after every convolution, or None.
        kernel_init: initial weights.
    """

    filters: int = 256
    blocks: int = 19
    normalization: Normalization | None = None
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Planes [batch, height, width, channels] -> feature maps [..., filters]."""
        conv = functools.partial(Conv, self.filters, (3, 3), kernel_init=self.kernel_init)
        x = NormalizedLayer(conv, nn.relu, self.normalization)(x, train)
        for _ in range(self.blocks):
            x = ResidualBlock(self.filters, self.normalization, self.kernel_init)(x, train)
        return x


class PolicyHead(nn.Module):
    """Two 1×1 filters → BN → ReLU → dense: one logit per move, or per class."""

    outputs: int
    normalization: Normalization | None = None
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Feature maps [batch, height, width, filters] -> logits [batch, outputs]."""
        conv = functools.partial(Conv, 2, (1, 1), kernel_init=self.kernel_init)
        x = NormalizedLayer(conv, nn.relu, self.normalization)(x, train)
        return nn.Dense(self.outputs, kernel_init=self.kernel_init)(x.reshape(len(x), -1))


class ValueHead(nn.Module):
    """One 1×1 filter → BN → ReLU → dense 256 → ReLU → dense 1 → tanh: the expected result."""

    normalization: Normalization | None = None
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Feature maps [batch, height, width, filters] -> values [batch] between -1 and 1."""
        conv = functools.partial(Conv, 1, (1, 1), kernel_init=self.kernel_init)
        x = NormalizedLayer(conv, nn.relu, self.normalization)(x, train)
        x = nn.relu(nn.Dense(256, kernel_init=self.kernel_init)(x.reshape(len(x), -1)))
        return nn.tanh(nn.Dense(1, kernel_init=self.kernel_init)(x))[:, 0]


class AlphaGoZero(nn.Module):
    """The whole network of Silver et al. (2017): a tower, a policy head and a value head.

    Attributes:
        filters, blocks, normalization, kernel_init: of the tower.
        moves: logits of the policy; 19·19 + 1 in the paper, whose input is [batch, 19, 19, 17].
    """

    filters: int = 256
    blocks: int = 19
    moves: int = 362
    normalization: Normalization | None = None
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, planes: Array, *, train: bool) -> tuple[Array, Array]:
        """Planes [batch, height, width, channels] -> policy [batch, moves], value [batch]."""
        shared = {"normalization": self.normalization, "kernel_init": self.kernel_init}
        x = Tower(self.filters, self.blocks, **shared)(planes, train=train)
        policy = PolicyHead(self.moves, **shared)(x, train=train)
        return policy, ValueHead(**shared)(x, train=train)


class TowerClassifier(nn.Module):
    """The tower with its policy head over classes instead of moves."""

    filters: int = 16
    blocks: int = 2
    classes: int = 10
    normalization: Normalization | None = None
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Images [batch, height, width] -> logits [batch, classes]."""
        shared = {"normalization": self.normalization, "kernel_init": self.kernel_init}
        x = Tower(self.filters, self.blocks, **shared)(images[..., None], train=train)
        return PolicyHead(self.classes, **shared)(x, train=train)
