"""Steps per second of the training loop, against the loop that Flax users write.

Run it with: bn-jax bench --suite train-step

Both loops train the paper's network (3 hidden layers of 100 sigmoids, batch norm before each) on
MNIST by SGD in batches of 60, and compute the same. Ours runs chunks of steps under `lax.scan` on
data that stays on the device, with our batch norm. The other calls a jitted step (state donated,
flax.linen.BatchNorm as it comes) from Python for every batch, which numpy picks; torch's is eager.

Last result, 2026-11-26, 2 cores of an AMD EPYC (on a day when it was half as fast as at its best),
jax 0.10.2, flax 0.12.8, optax 0.2.8, torch 2.13.0, three runs of 15 turns: flax's loop takes 1.52,
1.44 and 1.34 times as long as ours (quartiles 1.43 to 1.63, 1.25 to 1.52, 1.23 to 1.43), torch's
4.2, 3.3 and 4.0 times; ours takes 593, 671 and 681 µs per step. A fourth, since y is made from
sums: 1.40 (1.33 to 1.64), 3.4; 541 µs. Before a layer's sums came in pairs: 1.23 and 1.27 the same
day, and 1.23 to 1.34 in eight runs on a faster one, where ours took 384 µs at best, of which 280
are matrix products, at the speed of the cores.

On an NVIDIA H100 (2026-11-27, jax 0.11.2, flax 0.12.10, torch 2.11.0, 9 turns) ours takes 63 µs per
step, flax's loop 7.5 times as long (6.7 to 7.8), torch's 37 times (35 to 41). Without batch norm,
`bn-jax train` makes 21,900 steps per second there instead of 15,800.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from bn_jax.train.build import build_model, build_optimizer
from bn_jax.train.config import TrainConfig
from bn_jax.train.loop import run_chunk
from bn_jax.train.models import MLP
from bn_jax.train.step import init_state, make_train_step

OURS, THEIRS, TORCH = "bn_jax, scanned", "flax, step by step", "torch, eager"


def scanned(config: TrainConfig, data: Dataset, steps: int) -> Callable[[], object]:
    """Our loop: a function that trains for some more steps at each call."""
    model, optimizer = build_model(config, "batch"), build_optimizer(config)
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels, jnp.int32)
    state = init_state(model, optimizer, images[:1], config.seed)
    train_step = make_train_step(model, optimizer, config.binarization)

    def run() -> None:
        nonlocal state
        state, loss = run_chunk(
            train_step, state, images, labels, steps=steps, batch_size=config.batch_size
        )
        jax.block_until_ready((state, loss))

    return run


def step_by_step(config: TrainConfig, data: Dataset, steps: int) -> Callable[[], object]:
    """The usual loop: one call of a jitted step per batch."""
    model = MLP(config.hidden, normalization=functools.partial(nn.BatchNorm, momentum=config.decay))
    optimizer = optax.sgd(config.learning_rate)
    images, labels = np.asarray(data.train_images), data.train_labels.astype(np.int32)
    variables = model.init(jax.random.key(config.seed), jnp.zeros((1, 28, 28)), train=False)
    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    generator = np.random.default_rng(config.seed)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, images, labels):
        params, batch_stats, opt_state = state
        inputs = (images > 127).astype(jnp.float32)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    def run() -> None:
        nonlocal state
        order = generator.permutation(len(images))
        loss = None
        for start in range(0, steps * config.batch_size, config.batch_size):
            rows = order[start : start + config.batch_size]
            state, loss = train_step(state, images[rows], labels[rows])
        jax.block_until_ready((state, loss))

    return run


def torch_eager(config: TrainConfig, data: Dataset, steps: int) -> Callable[[], object]:
    """The same in torch, as its users write it."""
    torch: Any = importlib.import_module("torch")
    layers, width = [torch.nn.Flatten()], data.train_images[0].size
    for hidden in config.hidden:
        linear = torch.nn.Linear(width, hidden, bias=False)
        layers += [linear, torch.nn.BatchNorm1d(hidden, momentum=0.01), torch.nn.Sigmoid()]
        width = hidden
    device = torch_device()
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 10)).to(device)
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


def measure(data: Dataset, *, steps: int, turns: int) -> dict[str, Timing]:
    """Time the loops in turns of some steps, at most an epoch."""
    config = TrainConfig()
    loops = {OURS: scanned, THEIRS: step_by_step}
    if importlib.util.find_spec("torch"):
        loops[TORCH] = torch_eager
    contenders = {name: loop(config, data, steps) for name, loop in loops.items()}
    return interleave(contenders, reference=OURS, turns=turns)


def run(*, turns: int = 15, steps: int = 1000, data_dir: Path | None = None) -> Report:
    """Time the loops on MNIST."""
    timings = measure(load(data_dir=data_dir), steps=steps, turns=turns)
    rows = [
        {
            "contender": name,
            "microseconds": timing.median / steps * 1e6,
            "ratio": timing.ratio,
            "quartiles": list(timing.spread),
        }
        for name, timing in timings.items()
    ]
    return Report("train-step", rows, [table(rows)], bars(rows))


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Loops down."""
    result = Table(title="The paper's network on MNIST, batches of 60", title_justify="left")
    for heading in ("loop", "µs per step", "steps/s", "times as long", "quartiles"):
        result.add_column(heading, justify="left" if heading == "loop" else "right")
    for r in rows:
        first, third = r["quartiles"]
        figures = (f"{r['microseconds']:,.0f}", f"{1e6 / r['microseconds']:,.0f}")
        result.add_row(r["contender"], *figures, f"{r['ratio']:.2f}", f"{first:.2f}–{third:.2f}")
    return result


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """What the loop is to reach."""
    bounds = {THEIRS: 1.3, TORCH: 2.0}
    return [
        Bar(f"{name} / {OURS}", r["ratio"], bounds[name], at_least=True)
        for r in rows
        if (name := r["contender"]) in bounds
    ]
