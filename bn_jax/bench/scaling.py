"""The traffic of synchronized batch norm between devices, in a training step of ResNet-50.

Measured: the collectives that one layer runs, and the bytes that each device contributes to each.
They are read from the program that XLA compiles for two CPU devices; programs for more devices have
the same collectives. torch's layer needs GPUs, so its collectives are read from its source.

Computed: what each device sends for 53 batch norms, with two textbook algorithms. The gradients of
scale and bias are left out, because any data-parallel training sums them with those of all other
parameters.

Run it with: bn-jax bench --suite scaling. Results are in RESULTS.md. The count of a batch without a
mask is a constant, and XLA computes its sum at compile time; jax 0.8.2 does not, so there our layer
sums 2C and 3C floats forward.
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
    """The channels of ResNet-50's batch norms (He et al. 2015, table 1), in order.

    One follows the first convolution. Each of the 16 bottleneck blocks has three, the last of them
    four times as wide. The first block of each of the four stages has another on its shortcut.
    """
    channels = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        channels += [width, width, 4 * width] * blocks + [4 * width]
    return channels


RESNET50 = tuple(resnet50())


class Collective(NamedTuple):
    """One collective operation among all devices.

    Attributes:
        kind: all-reduce or all-gather.
        size: the bytes that each device contributes.

    >>> Collective("all-reduce", 4 * 64)
    Collective(kind='all-reduce', size=256)
    """

    kind: str
    size: int


class Exchange(NamedTuple):
    """The collectives in a layer's training step.

    >>> Exchange(forward=[Collective("all-reduce", 512)], backward=[]).backward
    []
    """

    forward: list[Collective]
    backward: list[Collective]


class Traffic(NamedTuple):
    """The bytes and messages that one device sends.

    >>> Traffic(size=1400.0, messages=14).messages
    14
    """

    size: float
    messages: int


# Measured.


def ours(channels: int) -> Functional:
    """bn_jax.batch_norm over a named axis."""
    return peers.ours((channels,), 0.99, axis_name=AXIS)


def flax(channels: int) -> Functional:
    """flax.linen.BatchNorm with its defaults, over a named axis."""
    return peers.flax((channels,), 0.99, axis_name=AXIS)


def flax_accurate(channels: int) -> Functional:
    """flax.linen.BatchNorm with use_fast_variance=False, over a named axis."""
    return peers.flax((channels,), 0.99, axis_name=AXIS, fast=False)


MEASURED: dict[str, Callable[[int], Functional]] = {
    OURS: ours,
    "flax": flax,
    "flax accurate": flax_accurate,
}


def torch(channels: int) -> Exchange:
    """The collectives of torch.nn.SyncBatchNorm, from torch/nn/modules/_functions.py of torch 2.13.

    Forward, it gathers mean, invstd and count, 2C + 1 floats, from all devices. Backward, it sums
    sum_dy and sum_dy_xmu, 2C floats.
    """
    return Exchange(
        [Collective("all-gather", 4 * (2 * channels + 1))], [Collective("all-reduce", 8 * channels)]
    )


def measure_apart(channels: Iterable[int]) -> dict[str, dict[int, Exchange]]:
    """Run `measure` in another process, which has two devices."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=start_two_devices) as pool:
        return pool.submit(measure, sorted(set(channels))).result()


def start_two_devices() -> None:
    """Give JAX two CPU devices; to be called before JAX starts."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)


def measure(channels: Sequence[int]) -> dict[str, dict[int, Exchange]]:
    """The collectives of each layer in MEASURED, by name and channels; needs two devices."""
    return {
        name: {size: exchange_of(make(size), size) for size in channels}
        for name, make in MEASURED.items()
    }


def exchange_of(layer: Functional, channels: int) -> Exchange:
    """The collectives of a layer; those of a step that forward lacks belong to backward."""
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.ShapeDtypeStruct((4, 4, 4, channels), jnp.float32)

    def forward(params: Any, state: Any, x: Array) -> tuple[Array, Any]:
        return layer.apply(params, state, x, True)

    def step(params: Any, state: Any, x: Array) -> tuple[Array, Any]:
        y, pullback, new = jax.vjp(lambda x: forward(params, state, x), x, has_aux=True)
        # The gradient depends on y, as in a network. Otherwise XLA would merge both passes' sums.
        return pullback(jnp.sin(y))[0], new

    def compiled(function: Callable[..., Any]) -> list[Collective]:
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=(P(AXIS), P())
        )
        program = jax.jit(sharded).lower(layer.params, layer.state, x).compile().as_text()
        return collectives(program or "", mesh.size)

    first, both = compiled(forward), Counter(compiled(step))
    if not Counter(first) <= both:
        raise ValueError(f"a step has the collectives {both}, but its forward pass has {first}")
    return Exchange(first, sorted((both - Counter(first)).elements()))


def collectives(program: str, devices: int) -> list[Collective]:
    """The collectives in the text of a compiled program.

    Raises:
        ValueError: there is a collective that `ring` and `doubling` do not cover.

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


# Computed.


def ring(collective: Collective, devices: int) -> Traffic:
    """The traffic if each device sends to the next: the fewest bytes (Patarasuk & Yuan 2009).

    In an all-gather, each device passes on the parts of all others, in n - 1 messages. In an
    all-reduce of S bytes, it passes on S/n bytes of sums n - 1 times, until each device has one
    part of the result; then the parts are gathered. That is 2(n-1)/n S bytes in 2(n-1) messages.

    >>> ring(Collective("all-reduce", 800), 8)
    Traffic(size=1400.0, messages=14)
    """
    others = devices - 1
    if collective.kind == "all-gather":
        return Traffic(others * collective.size, others)
    return Traffic(2 * others / devices * collective.size, 2 * others)


def doubling(collective: Collective, devices: int) -> Traffic:
    """The traffic if devices exchange in pairs, then in pairs of pairs: the fewest messages.

    That takes log₂ n messages. Each holds a whole sum of S bytes, or all that was gathered so far.
    This is recursive doubling, which Thakur, Rabenseifner & Gropp (2005) recommend for small arrays
    such as a batch norm's.

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
    """Measure each layer, and add up the traffic of a whole network."""
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
    """The sum."""
    sizes, messages = zip(*traffic, strict=True)
    return Traffic(sum(sizes), sum(messages))


def layer_table(layers: dict[str, Exchange], channels: int) -> Table:
    """A table of each layer's collectives, in floats per channel."""
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
    """A table of the traffic per device."""
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
    """Bars: two collectives forward, one of them for accuracy at large means; one backward."""
    return [
        Bar(f"collectives of a layer, {what}", len(part), bound, at_least=False)
        for what, part, bound in zip(Exchange._fields, layers[OURS], (2, 1), strict=True)
    ]
