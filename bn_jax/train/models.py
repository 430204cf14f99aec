"""The networks, with the normalization as an argument.

A `Normalization` makes a module when called with `use_running_average`, as
`functools.partial(BatchNorm, momentum=0.9)` does; None leaves it out. A new normalizer joins by
being one; no network changes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
from jax import Array
from jax.typing import DTypeLike

from bn_jax.train.convolution import convolve

Normalization = Callable[..., nn.Module]
Activation = Callable[[Array], Array]
Placement = Literal["pre-activation", "input"]
Initializer = jax.nn.initializers.Initializer

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def normalize(x: Array, normalization: Normalization | None, train: bool) -> Array:
    """Normalize x by a new submodule of the calling module; without a normalization, return x."""
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


class Network(nn.Module):
    """What all networks have in common.

    Attributes:
        normalization: of each hidden layer, or None.
        kernel_init: initial weights.
        dtype: to compute in; parameters are float32.
        activation, placement: of each hidden layer; the tower's are those of its paper.
    """

    normalization: Normalization | None = None
    kernel_init: Initializer = he_normal
    dtype: DTypeLike | None = None
    activation: Activation = nn.relu
    placement: Placement = "pre-activation"

    @property
    def shared(self) -> dict[str, Any]:
        """What a network hands on to its parts."""
        names = ("normalization", "kernel_init", "dtype")
        return {name: getattr(self, name) for name in names}

    def dense(self, size: int) -> Callable[..., nn.Module]:
        """A linear map of all features."""
        return functools.partial(nn.Dense, size, kernel_init=self.kernel_init, dtype=self.dtype)

    def conv(self, filters: int, size: int = 3) -> Callable[..., nn.Module]:
        """A convolution with square kernels."""
        return functools.partial(
            nn.Conv,
            filters,
            (size, size),
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            conv_general_dilated=convolve,
        )

    def layer(self, linear: Callable[..., nn.Module]) -> NormalizedLayer:
        """A hidden layer."""
        return NormalizedLayer(linear, self.activation, self.normalization, self.placement)


class MLP(Network):
    """The fully connected network of section 4.1; normalizes hidden layers, not the logits.

    Attributes:
        hidden: sizes of the hidden layers.
        classes: number of logits.
    """

    activation: Activation = nn.sigmoid
    kernel_init: Initializer = nn.initializers.normal(0.04)
    hidden: Sequence[int] = (100, 100, 100)
    classes: int = 10

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Images [batch, height, width] -> logits [batch, classes]."""
        x = images.reshape(len(images), -1)
        for size in self.hidden:
            x = self.layer(self.dense(size))(x, train)
        return self.dense(self.classes)()(x)


class CNN(Network):
    """Two 3×3 convolutions, each followed by 2×2 pooling, and a hidden dense layer.

    Attributes:
        filters: feature maps of the first convolution; the second has twice as many.
        classes: number of logits.
    """

    filters: int = 16
    classes: int = 10

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Images [batch, height, width] -> logits [batch, classes]."""
        x = images[..., None]
        for filters in (self.filters, 2 * self.filters):
            x = self.layer(self.conv(filters))(x, train)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = self.layer(self.dense(128))(x.reshape(len(x), -1), train)
        return self.dense(self.classes)()(x)


class ResidualBlock(Network):
    """conv → BN → ReLU → conv → BN → add the input → ReLU (Silver et al. 2017, Methods)."""

    filters: int = 256

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Feature maps [batch, height, width, filters] -> the same shape."""
        residual = self.layer(self.conv(self.filters))(x, train)
        residual = self.conv(self.filters)(use_bias=self.normalization is None)(residual)
        return nn.relu(x + normalize(residual, self.normalization, train))


class Tower(Network):
    """AlphaGo Zero's trunk: a convolution block and then residual blocks (Silver et al. 2017).

    Attributes:
        filters: feature maps of every convolution; 256 in the paper.
        blocks: residual blocks; 19 or 39 in the paper.
    """

    filters: int = 256
    blocks: int = 19

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Planes [batch, height, width, channels] -> feature maps [..., filters]."""
        x = self.layer(self.conv(self.filters))(x, train)
        for _ in range(self.blocks):
            x = ResidualBlock(filters=self.filters, **self.shared)(x, train)
        return x


class PolicyHead(Network):
    """Two 1×1 filters → BN → ReLU → dense: one logit per move, or per class."""

    outputs: int = 362

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Feature maps [batch, height, width, filters] -> logits [batch, outputs]."""
        x = self.layer(self.conv(2, size=1))(x, train)
        return self.dense(self.outputs)()(x.reshape(len(x), -1))


class ValueHead(Network):
    """One 1×1 filter → BN → ReLU → dense 256 → ReLU → dense 1 → tanh: the expected result."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Feature maps [batch, height, width, filters] -> values [batch] between -1 and 1."""
        x = self.layer(self.conv(1, size=1))(x, train)
        x = nn.relu(self.dense(256)()(x.reshape(len(x), -1)))
        return nn.tanh(self.dense(1)()(x))[:, 0]


class AlphaGoZero(Network):
    """The whole network of Silver et al. (2017): a tower, a policy head and a value head.

    Attributes:
        filters, blocks: of the tower.
        moves: logits of the policy; 19·19 + 1 in the paper, whose input is [batch, 19, 19, 17].
    """

    filters: int = 256
    blocks: int = 19
    moves: int = 362

    @nn.compact
    def __call__(self, planes: Array, *, train: bool) -> tuple[Array, Array]:
        """Planes [batch, height, width, channels] -> policy [batch, moves], value [batch]."""
        x = Tower(filters=self.filters, blocks=self.blocks, **self.shared)(planes, train=train)
        policy = PolicyHead(outputs=self.moves, **self.shared)(x, train=train)
        return policy, ValueHead(**self.shared)(x, train=train)


class TowerClassifier(Network):
    """The tower with its policy head over classes instead of moves."""

    filters: int = 16
    blocks: int = 2
    classes: int = 10

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Images [batch, height, width] -> logits [batch, classes]."""
        tower = Tower(filters=self.filters, blocks=self.blocks, **self.shared)
        x = tower(images[..., None], train=train)
        return PolicyHead(outputs=self.classes, **self.shared)(x, train=train)
