"""How arrays are sharded: over no devices, or over several that share the examples or the runs.

The program is the same in each case. If devices share the examples, each has all parameters and
statistics, and XLA adds the communication: the mean of a batch is the mean over all of it, however
many devices hold its parts. If they share the runs, each device has all examples and trains its own
runs, without communication.
"""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA = "data"
MOST = 256
"""Devices in a process; more would take minutes to start."""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Which devices hold what training needs.

    Attributes:
        mesh: the devices, along one axis "data"; None for one device, where nothing is sharded.
        runs: whether the devices share the runs, and not the examples.
    """

    mesh: Mesh | None = None
    runs: bool = False

    def examples(self, array: np.ndarray, filler: int = 0) -> Array:
        """Shard an array of examples, with a filler appended until all shares are equal.

        It is the same in each process, which copies only what its own devices hold.
        """
        if self.mesh is None:
            return jnp.asarray(array)
        if not self.runs:
            widths = [(0, -len(array) % self.mesh.size)] + [(0, 0)] * (array.ndim - 1)
            array = np.pad(array, widths, constant_values=filler)
        named = NamedSharding(self.mesh, PartitionSpec() if self.runs else PartitionSpec(DATA))
        return jax.make_array_from_callback(array.shape, named, lambda index: array[index])

    def everywhere(self, tree: Any) -> Any:
        """Copy a tree of arrays to each device."""
        if self.mesh is None:
            return tree
        return jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)

    def shard(self, tree: Any, axis: int = 0) -> Any:
        """Under jit: give each device its share of the examples along an axis."""
        return self.constrain(tree, PartitionSpec(*[None] * axis, DATA))

    def replicate(self, tree: Any) -> Any:
        """Under jit: give each device all of it."""
        return self.constrain(tree, PartitionSpec())

    def constrain(self, tree: Any, spec: PartitionSpec) -> Any:
        """Under jit: shard the arrays of a tree in this way, where devices share the examples."""
        if self.mesh is None or self.runs:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))

    def each_run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Under jit: call a function for each run, and copy the results to every device.

        The first argument has a leading axis of runs; the others are the same for all.
        """
        mapped = jax.vmap(function, (0, *[None] * (len(arguments) - 1)))
        if self.mesh is None or not self.runs:
            return mapped(*arguments)
        own, same = PartitionSpec(DATA), PartitionSpec()
        specs = {"in_specs": (own, *[same] * (len(arguments) - 1)), "out_specs": own}
        results = jax.shard_map(mapped, mesh=self.mesh, **specs, check_vma=False)(*arguments)
        return jax.lax.with_sharding_constraint(results, NamedSharding(self.mesh, same))


ONE_DEVICE = Sharding()


def make_sharding(devices: int | None, runs: bool = False) -> Sharding:
    """The sharding over so many devices, equally many of each process.

    Args:
        devices: how many; None for one, or, where there are several processes, for all.
        runs: whether they share the runs, and not the examples.

    Raises:
        ValueError: there are fewer devices, or they cannot be equally many of each process.
    """
    processes = jax.process_count()
    if processes == 1 and devices in (None, 1):
        return ONE_DEVICE
    (here,) = jnp.zeros(()).devices()  # where new arrays go, which --device may have changed
    present = jax.devices(here.platform)
    parts = [[d for d in present if d.process_index == p] for p in range(processes)]
    most = min(map(len, parts)) * processes
    devices = devices or most
    if devices % processes:
        raise ValueError(
            f"--devices {devices}: must be a multiple of {processes}, the number of processes"
        )
    if devices > most:
        raise ValueError(
            f"--devices {devices}: JAX has {most} of kind {here.platform} here; choose fewer, "
            "or, to split the CPU, --device cpu before JAX is in use"
        )
    chosen = [part[: devices // processes] for part in parts]
    return Sharding(Mesh(np.ravel(chosen), (DATA,)), runs)


def choose_devices(device: str, devices: int | None, processes: int = 1) -> None:
    """Make JAX, before it is in use, compute on a kind of device, and split the CPU into several.

    Other kinds of device cannot be split; `make_sharding` says if there are too few. A ValueError
    says if there are none of this kind, or more than `MOST` in a process.
    """
    each = (devices or 1) // processes
    if each > MOST:
        raise ValueError(f"--devices {devices}: must be at most {MOST} in a process")
    if each > 1:
        with suppress(RuntimeError):  # JAX is in use already
            jax.config.update("jax_num_cpu_devices", each)
    if device == "auto":
        return
    try:
        jax.config.update("jax_default_device", jax.local_devices(backend=device)[0])
    except RuntimeError as error:
        raise ValueError(
            f"--device {device}: JAX finds none here ({error}); install jax's build for it, or "
            "choose --device auto"
        ) from error
