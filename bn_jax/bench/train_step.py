"""The time per training step of our loop, and of loops as users of flax and torch write them.

All loops train the same networks (the mlp, cnn and tower of `bn-jax train`, with batch norm) on
MNIST with SGD and batches of 60. Ours runs chunks of steps under `lax.scan`, with the data on the
device. The contenders "in our loop" run there too, with the usual training step of flax, and differ
in nothing but where `BatchNorm` is imported from, or in having none. flax's own loop calls a jitted
step from Python for every batch, which numpy picks; the state is donated, and the layer is
flax.linen.BatchNorm with its defaults. torch's loop is eager.

Run it with: bn-jax bench --suite train-step. Results are in RESULTS.md.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from bn_jax.bench.interleave import Timing, interleave
from bn_jax.bench.peers import torch_device
from bn_jax.bench.report import Bar, Report
from bn_jax.data import Dataset, load
from bn_jax.layers.linen import BatchNorm
from bn_jax.train.build import build_model
from bn_jax.train.chunks import split, steps_per_call
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import run_chunk
from bn_jax.train.progress import begin
from bn_jax.train.state import TrainState, init_state
from bn_jax.train.step import TrainStep, make_train_step

Model = Literal["mlp", "cnn", "tower"]
OURS, THEIRS, TORCH = "bn_jax, scanned", "flax, step by step", "torch, eager"
IN_OUR_LOOP = {
    "no batch norm, in our loop": None,
    "bn_jax, in our loop": BatchNorm,
    "flax, in our loop": nn.BatchNorm,
    "flax, accurate, in our loop": functools.partial(nn.BatchNorm, use_fast_variance=False),
}
State = tuple[Any, Any, optax.OptState]


def configuration(model: Model) -> TrainConfig:
    """The configuration of a network, with a learning rate at which it learns."""
    return TrainConfig(model=model, learning_rate=0.15 if model == "mlp" else 0.05)


def chunk_size(config: TrainConfig) -> int:
    """The number of steps that `bn-jax train` runs in one compiled call."""
    images = np.zeros((config.batch_size, 28, 28), np.uint8)
    state = init_state(config, "batch", images[:1])
    return steps_per_call(make_train_step(config, "batch"), state, images)


def scanned(config: TrainConfig, data: Dataset, steps: int) -> Callable[[], object]:
    """Our loop: a function that trains for more steps at each call."""
    state = init_state(config, "batch", data.train_images[:1])
    return in_chunks(config, data, steps, state, make_train_step(config, "batch"))


def in_our_loop(
    normalization: Callable[..., nn.Module] | None, config: TrainConfig, data: Dataset, steps: int
) -> Callable[[], object]:
    """Our loop with the training step of flax's documentation, and any batch norm or none."""
    start, usual_step = in_flax(config, normalization)
    state = init_state(config, "batch", data.train_images[:1])
    state = state._replace(params=start[0], batch_stats=start[1], opt_state=start[2])

    def train_step(state: TrainState, images: Any, labels: Any) -> tuple[TrainState, Any]:
        old = state.params, state.batch_stats, state.opt_state
        new, loss = usual_step(old, images, labels)
        return TrainState(*new, state.step + 1, state.key), loss

    return in_chunks(config, data, steps, state, train_step)


def in_chunks(
    config: TrainConfig, data: Dataset, steps: int, state: TrainState, train_step: TrainStep
) -> Callable[[], object]:
    """A function that takes more steps at each call, in compiled chunks."""
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels, jnp.int32)
    sizes = split(steps, chunk_size(config))

    def run() -> None:
        nonlocal state
        for size in sizes:
            progress, finite = run_chunk(
                train_step, begin(state), images, labels, steps=size, batch_size=config.batch_size
            )
            jax.block_until_ready((progress, finite))
            state = progress.state

    return run


def step_by_step(config: TrainConfig, data: Dataset, steps: int) -> Callable[[], object]:
    """The usual loop in flax: one call of a jitted step per batch."""
    images, labels = np.asarray(data.train_images), data.train_labels.astype(np.int32)
    state, usual_step = in_flax(config, nn.BatchNorm)
    train_step = jax.jit(usual_step, donate_argnums=0)
    generator = np.random.default_rng(config.seed)

    def run() -> None:
        nonlocal state
        order = generator.permutation(len(images))
        loss = None
        for start in range(0, steps * config.batch_size, config.batch_size):
            rows = order[start : start + config.batch_size]
            state, loss = train_step(state, images[rows], labels[rows])
        jax.block_until_ready((state, loss))

    return run


def in_flax(
    config: TrainConfig, normalization: Callable[..., nn.Module] | None
) -> tuple[State, Callable[[State, Any, Any], tuple[State, Any]]]:
    """The first state, and the training step as flax's documentation writes it."""
    if normalization is not None:
        normalization = functools.partial(normalization, momentum=config.decay)
    model = build_model(config, "batch").clone(normalization=normalization)
    optimizer = optax.sgd(config.learning_rate)
    variables = model.init(jax.random.key(config.seed), jnp.zeros((1, 28, 28)), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})

    def train_step(state: State, images: Any, labels: Any) -> tuple[State, Any]:
        params, batch_stats, opt_state = state
        inputs = (images > 127).astype(jnp.float32)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates.get("batch_stats", {})

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return (params, batch_stats, optimizer.init(params)), train_step


def torch_eager(config: TrainConfig, data: Dataset, steps: int) -> Callable[[], object]:
    """The usual loop in torch: eager."""
    torch: Any = importlib.import_module("torch")
    device = torch_device()
    model = torch_network(torch, config).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    images = torch.from_numpy(np.array(data.train_images)).to(device)  # a copy: torch writes
    labels = torch.from_numpy(data.train_labels.astype(np.int64)).to(device)

    def run() -> None:
        order = torch.randperm(len(images), device=device)
        for start in range(0, steps * config.batch_size, config.batch_size):
            rows = order[start : start + config.batch_size]
            optimizer.zero_grad()
            inputs = (images[rows] > 127).to(torch.float32)
            torch.nn.functional.cross_entropy(model(inputs), labels[rows]).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def torch_network(torch: Any, config: TrainConfig) -> Any:
    """A configuration's network, made of torch's layers."""
    nn, relu = torch.nn, torch.nn.ReLU

    def normalized(linear: Any, features: int, activation: Any) -> list[Any]:
        norm = nn.BatchNorm1d if isinstance(linear, nn.Linear) else nn.BatchNorm2d
        return [linear, norm(features, momentum=0.01), *activation]

    def conv(inputs: int, outputs: int, size: int = 3) -> Any:
        return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)

    class Residual(nn.Module):
        def __init__(self, filters: int) -> None:
            super().__init__()
            first = normalized(conv(filters, filters), filters, [relu()])
            self.inner = nn.Sequential(*first, *normalized(conv(filters, filters), filters, []))

        def forward(self, x: Any) -> Any:
            return torch.relu(x + self.inner(x))

    layers, filters, sigmoid = [], config.filters, nn.Sigmoid
    if config.model == "mlp":
        widths = (28 * 28, *config.hidden)
        for inputs, outputs in itertools.pairwise(widths):
            linear = nn.Linear(inputs, outputs, bias=False)
            layers += normalized(linear, outputs, [sigmoid()])
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))
    image = nn.Unflatten(1, (1, 28))
    if config.model == "cnn":
        for inputs, outputs in ((1, filters), (filters, 2 * filters)):
            layers += normalized(conv(inputs, outputs), outputs, [sigmoid(), nn.MaxPool2d(2)])
        hidden = nn.Linear(49 * 2 * filters, 128, bias=False)
        layers += [nn.Flatten(), *normalized(hidden, 128, [sigmoid()])]
        return nn.Sequential(image, *layers, nn.Linear(128, 10))
    layers += normalized(conv(1, filters), filters, [relu()])
    layers += [Residual(filters) for _ in range(config.blocks)]
    layers += [*normalized(conv(filters, 2, 1), 2, [relu()]), nn.Flatten()]
    return nn.Sequential(image, *layers, nn.Linear(2 * 28 * 28, 10))


def measure(config: TrainConfig, data: Dataset, *, steps: int, turns: int) -> dict[str, Timing]:
    """Time the loops in turns; a turn's steps must fit in an epoch."""
    loops = {OURS: scanned, THEIRS: step_by_step}
    loops |= {name: functools.partial(in_our_loop, norm) for name, norm in IN_OUR_LOOP.items()}
    if importlib.util.find_spec("torch"):
        loops[TORCH] = torch_eager
    contenders = {name: loop(config, data, steps) for name, loop in loops.items()}
    return interleave(contenders, reference=OURS, turns=turns)


def run(*, turns: int = 15, data_dir: Path | None = None) -> Report:
    """Time the loops on MNIST."""
    data, rows = load(data_dir=data_dir), []
    for model in get_args(Model):
        config = configuration(model)
        steps = min(2 * chunk_size(config), 1000)
        rows += [
            {
                "model": model,
                "contender": name,
                "microseconds": timing.median / steps * 1e6,
                "ratio": timing.ratio,
                "quartiles": list(timing.quartiles),
            }
            for name, timing in measure(config, data, steps=steps, turns=turns).items()
        ]
    return Report("train-step", rows, [table(rows)], bars(rows))


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A table with a row per network and loop."""
    device = jax.devices()[0].device_kind
    result = Table(title=f"Training on MNIST, batches of 60, on {device}", title_justify="left")
    for heading in ("network", "loop", "µs per step", "steps/s", "times as long", "quartiles"):
        result.add_column(heading, justify="left" if heading in ("network", "loop") else "right")
    for r in rows:
        first, third = r["quartiles"]
        figures = (f"{r['microseconds']:,.0f}", f"{1e6 / r['microseconds']:,.0f}")
        quartiles = f"{first:.2f}–{third:.2f}"
        result.add_row(r["model"], r["contender"], *figures, f"{r['ratio']:.2f}", quartiles)
    return result


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The bars of our loop: higher for the mlp, whose short steps make calls from Python costly."""
    bounds = {("mlp", THEIRS): 1.3, ("mlp", TORCH): 2.0}
    bounds |= {(model, THEIRS): 1 / 1.2 for model in ("cnn", "tower")}
    return [
        Bar(f"{key[0]}: {key[1]} / {OURS}", r["ratio"], bounds[key], at_least=True)
        for r in rows
        if (key := (r["model"], r["contender"])) in bounds
    ]
