"""Small networks that learn MNIST at half its resolution, all seeds at once, for `calibrate`.

Written with functions. The same weights and statistics go into models of flax.linen and flax.nnx,
whose layers are flax's own.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import bn_jax as bn
from bn_jax.data import load

SHAPES = {  # kernels; the last one makes logits, of the convolutional network from 4×4 places
    "dense": [(196, 32), (32, 32), (32, 10)],
    "conv": [(3, 3, 1, 8), (3, 3, 8, 16), (256, 10)],
}
PADDING = ((1, 1), (1, 1))
AVERAGES = {
    "kept": bn.DebiasedEma(0.99),
    "momentum 0.01": bn.DebiasedEma(0.01),
    "momentum 0.1": bn.DebiasedEma(0.1),
    "from 0 and 1": bn.Ema(0.99),
}
PART = 50  # steps that are compiled together


class Weights(NamedTuple):
    """What is learned."""

    kernels: list[Any]
    norms: list[bn.BatchNormParams]


class Trained(NamedTuple):
    """What training has come to: weights, their average over all steps, statistics by average."""

    weights: Weights
    averaged: Weights
    states: dict[str, list[bn.BatchNormState]]


def images_and_labels():
    """Training images, their labels, and test images; [n, 14, 14, 1], from 0 to 1."""
    data = load("mnist")

    def small(images):
        return images.reshape(-1, 14, 2, 14, 2).mean((2, 4))[..., None].astype(np.float32) / 255

    return small(data.train_images), data.train_labels.astype(np.int32), small(data.test_images)


def linear(kernel, x):
    """A dense layer; or 3×3, every second pixel, as XLA's loops are fast at: a product."""
    if kernel.ndim == 2:
        return x.reshape(len(x), -1) @ kernel
    x = jnp.pad(x, ((0, 0), *PADDING, (0, 0)))
    size = (x.shape[1] - 3) // 2 + 1
    ends = [slice(i, i + 2 * size - 1, 2) for i in range(3)]
    places = jnp.concatenate([x[:, rows, columns] for rows in ends for columns in ends], -1)
    return places @ kernel.reshape(-1, kernel.shape[-1])


def forward(weights, x, epsilon=1e-5):
    """Logits in training mode, and what each batch norm normalized."""
    (*hidden, last), seen = weights.kernels, []
    for kernel, norm in zip(hidden, weights.norms, strict=True):
        y, moments = bn.standardize(linear(kernel, x), norm, epsilon=epsilon)
        seen.append(moments)
        x = jax.nn.relu(y)
    return linear(last, x), seen


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0))
def start(kind, seed):
    """Before the first step."""
    keys = jax.random.split(jax.random.key(seed), len(SHAPES[kind]))
    shapes = zip(keys, SHAPES[kind], strict=True)
    kernels = [jax.random.normal(k, s) * np.sqrt(2 / np.prod(s[:-1])) for k, s in shapes]
    norms = [bn.init(shape[-1]) for shape in SHAPES[kind][:-1]]
    weights = Weights(kernels, [params for params, _ in norms])
    return Trained(weights, weights, {name: [state for _, state in norms] for name in AVERAGES})


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None, 0, None, None, None, None))
def fit(trained, images, labels, rows, rates, numbers, epsilon, alive):
    """Some steps of one seed."""

    def step(trained, inputs):
        rows, rate, number = inputs

        def loss_fn(weights):
            first, *others = weights.kernels
            living = weights._replace(kernels=[first * alive, *others])
            logits, seen = forward(living, images[rows], epsilon)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return losses.mean(), seen

        grads, seen = jax.grad(loss_fn, has_aux=True)(trained.weights)
        weights = jax.tree.map(lambda w, g: w - rate * g, trained.weights, grads)
        states = {
            name: [bn.advance(s, m, average) for s, m in zip(trained.states[name], seen)]  # noqa: B905
            for name, average in AVERAGES.items()
        }
        averaged = jax.tree.map(lambda a, w: a + (w - a) / number, trained.averaged, weights)
        return Trained(weights, averaged, states), None

    return lax.scan(step, trained, (rows, rates, numbers))[0]


def train(kind, seeds, images, labels, rows, rates, epsilon=1e-5, dead=()):
    """All seeds, after each part of the steps: [parts][seeds]."""
    trained = start(kind, jnp.asarray(seeds))
    alive = np.ones(SHAPES[kind][0][-1], np.float32)
    alive[list(dead)] = 0
    parts = []
    for begin in range(0, rows.shape[1], PART):
        part = slice(begin, begin + PART)
        numbers = np.arange(begin + 1, begin + PART + 1, dtype=np.float32)
        steps = rows[:, part], rates[part], numbers
        trained = fit(trained, images, labels, *steps, epsilon, alive)
        host = jax.device_get(trained)
        host.weights.kernels[0] = host.weights.kernels[0] * alive
        parts.append([jax.tree.map(lambda leaf, s=s: leaf[s], host) for s in range(len(seeds))])
    return parts


class Linen(nn.Module):
    """The dense network."""

    epsilon: float
    momentum: float

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        for width in (32, 32):
            x = nn.Dense(width, use_bias=False)(x)
            norm = nn.BatchNorm(not train, epsilon=self.epsilon, momentum=self.momentum)
            x = nn.relu(norm(x))
        return nn.Dense(10, use_bias=False)(x)


def linen_variables(weights, states):
    """Those of `Linen`."""
    params = {f"Dense_{n}": {"kernel": kernel} for n, kernel in enumerate(weights.kernels)}
    for n, (scale, bias) in enumerate(weights.norms):
        params[f"BatchNorm_{n}"] = {"scale": scale, "bias": bias}
    stats = {f"BatchNorm_{n}": {"mean": s.mean, "var": s.var} for n, s in enumerate(states)}
    return {"params": params, "batch_stats": stats}


class Nnx(nnx.Module):
    """The convolutional network."""

    def __init__(self, weights, states, **options):
        rngs = nnx.Rngs(0)
        self.convs, self.norms = nnx.List(), nnx.List()
        for kernel, norm, state in zip(weights.kernels, weights.norms, states, strict=False):
            fixed = {"strides": 2, "padding": PADDING, "use_bias": False}
            conv = nnx.Conv(*kernel.shape[2:], (3, 3), **fixed, rngs=rngs)
            layer = nnx.BatchNorm(kernel.shape[-1], **options, rngs=rngs)
            conv.kernel.set_value(jnp.asarray(kernel))
            for name, value in (norm._asdict() | state._asdict()).items():
                if name != "count":
                    getattr(layer, name).set_value(jnp.asarray(value))
            self.convs.append(conv)
            self.norms.append(layer)
        self.last = nnx.Param(jnp.asarray(weights.kernels[-1]))

    def __call__(self, x, use_running_average=None):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), use_running_average=use_running_average))
        return x.reshape(len(x), -1) @ self.last.get_value()
