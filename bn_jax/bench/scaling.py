"""What synchronized batch norm sends in a training step of ResNet-50, on many devices.

Measured: which collectives one layer runs, and how many bytes each device brings to each, read from
the program that XLA compiles for two CPU devices; the program for more has the same. Those of
torch, whose layer needs GPUs, are read from its source. On paper: what two textbook algorithms then
make each device send for the 53 batch norms. The gradients of scale and bias are not counted: any
data-parallel training sums them, with those of all other parameters.

Run it with: bn-jax bench --suite scaling

Last result, 2026-11-24, jax 0.10.2 and flax 0.12.8, torch 2.13 read: of C channels, ours sums C and
2 C floats forward and 2 C backward; flax 2 C and 2 C; with use_fast_variance=False C and C forward,
C and 2 C backward. By a ring of 4,096 devices, ours sends 1.06 MB a step, flax 0.85, torch 871: it
gathers what the others sum. The count of a batch without a mask is a constant, whose sum XLA works
out when it compiles; with jax 0.8.2 it does not, and ours sums 2 C and 3 C forward.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.table import Table

from bn_jax.bench import peers
from bn_jax.bench.contender import Functional
from bn_jax.bench.peers import OURS
from bn_jax.bench.report import Bar, Report

DEVICES = (8, 256, 4096)
AXIS = "devices"


def resnet50() -> list[int]:
    """The channels of its batch norms (He et al. 2015, table 1), in order.

    One follows the first convolution. Of 16 bottleneck blocks each has three, the last four times
    as wide as the others, and the first block of each of the four stages another on its shortcut.
    """
    channels = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        channels += [width, width, 4 * width] * blocks + [4 * width]
    return channels


RESNET50 = tuple(resnet50())


class Collective(NamedTuple):
    """One exchange among all devices.

    Attributes:
        kind: all-reduce or all-gather.
        size: bytes that each device brings.
    """

    kind: str
    size: int


class Exchange(NamedTuple):
    """The collectives of a layer's training step."""

    forward: list[Collective]
    backward: list[Collective]


class Traffic(NamedTuple):
    """What one device sends."""

    size: float
    messages: int


# Measured.


def ours(channels: int) -> Functional:
    """bn_jax.batch_norm over a named axis."""
    return peers.ours((channels,), 0.99, axis_name=AXIS)


def flax(channels: int) -> Functional:
    """flax.linen.BatchNorm as it comes, over a named axis."""
    return peers.flax((channels,), 0.99, axis_name=AXIS)


def flax_accurate(channels: int) -> Functional:
    """The same with use_fast_variance=False."""
    return peers.flax((channels,), 0.99, axis_name=AXIS, fast=False)


MEASURED: dict[str, Callable[[int], Functional]] = {
    OURS: ours,
    "flax": flax,
    "flax accurate": flax_accurate,
}


def torch(channels: int) -> Exchange:
    """What torch.nn.SyncBatchNorm exchanges, as torch 2.13's torch/nn/modules/_functions.py has it.

    Forward, `combined` of mean, invstd and count, 2C + 1 floats, is gathered from all; backward,
    `combined` of sum_dy and sum_dy_xmu, 2C floats, is summed.
    """
    return Exchange(
        [Collective("all-gather", 4 * (2 * channels + 1))], [Collective("all-reduce", 8 * channels)]
    )


def measure_apart(channels: Iterable[int]) -> dict[str, dict[int, Exchange]]:
    """`measure` in a process of its own: of two devices, which this one need not have."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=start_two_devices) as pool:
        return pool.submit(measure, sorted(set(channels))).result()


def start_two_devices() -> None:
    """Make JAX, before its start, one of two CPU devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)


def measure(channels: Sequence[int]) -> dict[str, dict[int, Exchange]]:
    """The collectives of each layer of MEASURED, by name and channels; needs two devices."""
    return {
        name: {size: exchange_of(make(size), size) for size in channels}
        for name, make in MEASURED.items()
    }


def exchange_of(layer: Functional, channels: int) -> Exchange:
    """The collectives of a layer; what a step has and forward has not is backward's."""
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.ShapeDtypeStruct((4, 4, 4, channels), jnp.float32)

    def forward(params: Any, state: Any, x: Array) -> tuple[Array, Any]:
        return layer.apply(params, state, x, True)

    def step(params: Any, state: Any, x: Array) -> tuple[Array, Any]:
        y, pullback, new = jax.vjp(lambda x: forward(params, state, x), x, has_aux=True)
        # The gradient depends on y, as in a network: else XLA sums for both passes at once.
        return pullback(jnp.sin(y))[0], new

    def compiled(function: Callable[..., Any]) -> list[Collective]:
        spread = jax.shard_map(
            function, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=(P(AXIS), P())
        )
        program = jax.jit(spread).lower(layer.params, layer.state, x).compile().as_text()
        return collectives(program or "", mesh.size)

    first, both = compiled(forward), Counter(compiled(step))
    if not Counter(first) <= both:
        raise ValueError(f"a step exchanges {both}, but its forward pass alone {first}")
    return Exchange(first, sorted((both - Counter(first)).elements()))


def collectives(program: str, devices: int) -> list[Collective]:
    """The collectives in the text of a compiled program.

    Raises:
        ValueError: there is one whose traffic `ring` and `doubling` do not know.

    >>> line = "%s = (f32[64]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), replica_groups={{0,1}}"
    >>> collectives(line, 2)
    [Collective(kind='all-reduce', size=280)]
    """
    kinds = r"(all-\w+|reduce-scatter|collective-\w+|ragged-all-to-all)([-\w]*)\("
    found = []
    for result, kind, rest in re.findall(rf" = (.+?) {kinds}", program):
        if rest or kind not in ("all-reduce", "all-gather"):
            raise ValueError(f"{kind}{rest} is neither all-reduce nor all-gather")
        size = sum(
            int(bits) // 8 * math.prod(map(int, filter(None, shape.split(","))))
            for bits, shape in re.findall(r"[a-z](\d+)\[([\d,]*)\]", result)
        )
        found.append(Collective(kind, size // devices if kind == "all-gather" else size))
    return found


# On paper.


def ring(collective: Collective, devices: int) -> Traffic:
    """Each device sends to the next: the fewest bytes (Patarasuk & Yuan 2009).

    An all-gather passes on all others' parts, in n - 1 messages. An all-reduce of S bytes passes on
    S/n bytes of sums, n - 1 times until each device has its part of them, and gathers the parts:
    2(n-1)/n S bytes in 2(n-1) messages.

    >>> ring(Collective("all-reduce", 800), 8)
    Traffic(size=1400.0, messages=14)
    """
    others = devices - 1
    if collective.kind == "all-gather":
        return Traffic(others * collective.size, others)
    return Traffic(2 * others / devices * collective.size, 2 * others)


def doubling(collective: Collective, devices: int) -> Traffic:
    """Pairs exchange what they have, then pairs of pairs: the fewest messages.

    log₂ n of them, each of a whole sum of S bytes or of all that is gathered so far (recursive
    doubling; Thakur, Rabenseifner & Gropp 2005, who recommend it for small arrays, as a batch
    norm's are).

    Raises:
        ValueError: the number of devices is not a power of 2.

    >>> doubling(Collective("all-reduce", 800), 8)
    Traffic(size=2400, messages=3)
    """
    rounds = devices.bit_length() - 1
    if devices != 2**rounds:
        raise ValueError(f"devices={devices} must be a power of 2")
    if collective.kind == "all-gather":
        return Traffic((devices - 1) * collective.size, rounds)
    return Traffic(rounds * collective.size, rounds)


def run(*, channels: Sequence[int] = RESNET50, devices: Sequence[int] = DEVICES) -> Report:
    """Measure each layer, and add up over the layers of a network."""
    layers = measure_apart(channels) | {"torch": {size: torch(size) for size in channels}}
    rows = []
    for name, exchange in layers.items():
        each = [c for size in channels for part in exchange[size] for c in part]
        rows += [
            {
                "contender": name,
                "layers": len(channels),
                "devices": n,
                "collectives": len(each),
                "ring": total(ring(c, n) for c in each)._asdict(),
                "doubling": total(doubling(c, n) for c in each)._asdict(),
            }
            for n in devices
        ]
    first = {name: exchange[channels[0]] for name, exchange in layers.items()}
    tables = [layer_table(first, channels[0]), network_table(rows)]
    return Report("scaling", rows, tables, bars(first))


def total(traffic: Iterable[Traffic]) -> Traffic:
    """All of it."""
    sizes, messages = zip(*traffic, strict=True)
    return Traffic(sum(sizes), sum(messages))


def layer_table(layers: dict[str, Exchange], channels: int) -> Table:
    """What is exchanged, in floats per channel."""
    result = Table(
        title=f"Collectives of one layer; in brackets, their floats (C = {channels})",
        title_justify="left",
    )
    for heading in ("", "forward", "backward"):
        result.add_column(heading)
    for name, exchange in layers.items():
        cells = [
            ", ".join(f"{c.kind} ({c.size / 4 / channels:.3g} C)" for c in part)
            for part in exchange
        ]
        result.add_row(name, *cells)
    return result


def network_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What is sent."""
    result = Table(
        title=f"Sent by each device in a training step, {rows[0]['layers']} layers",
        title_justify="left",
    )
    result.add_column("")
    for heading in ("devices", "collectives", "MB, ring", "messages", "MB, doubling", "messages"):
        result.add_column(heading, justify="right")
    for r in rows:
        cells = [
            cell
            for way in ("ring", "doubling")
            for cell in (f"{r[way]['size'] / 1e6:,.2f}", f"{r[way]['messages']:,}")
        ]
        result.add_row(r["contender"], f"{r['devices']:,}", str(r["collectives"]), *cells)
    return result


def bars(layers: dict[str, Exchange]) -> list[Bar]:
    """Forward one, and one more that buys accuracy where means are large; backward one."""
    return [
        Bar(f"collectives of a layer, {what}", len(part), bound, at_least=False)
        for what, part, bound in zip(Exchange._fields, layers[OURS], (2, 1), strict=True)
    ]
