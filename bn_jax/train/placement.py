"""Where the arrays are: on one device, or the examples spread over a mesh of several.

The program is the same in either case. Parameters and statistics are on every device, examples on
one each; XLA adds the communication, so that a batch is the batch, and its mean is the mean over
all of it, however many devices hold its parts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA = "data"


@dataclasses.dataclass(frozen=True)
class Placement:
    """How to place what training needs.

    Attributes:
        mesh: of one axis, "data", over which examples are spread; None for one device, on which
            everything stays as it is.
    """

    mesh: Mesh | None = None

    def examples(self, array: np.ndarray, filler: int = 0) -> Array:
        """An array of this process, each device with its share of the examples alone.

        Args:
            array: the same in each process.
            filler: what makes up for examples that are missing to equal shares.
        """
        if self.mesh is None:
            return jnp.asarray(array)
        missing = -len(array) % self.mesh.size
        if missing:
            widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
            array = np.pad(array, widths, constant_values=filler)
        return self.put(array, PartitionSpec(DATA))

    def everywhere(self, tree: Any) -> Any:
        """A tree of arrays of this process, whole on each device."""
        if self.mesh is None:
            return tree

        def put(leaf: Array) -> Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
            return self.put(np.asarray(leaf), PartitionSpec())

        return jax.tree.map(put, tree)

    def put(self, array: np.ndarray, spec: PartitionSpec) -> Array:
        """An array over the mesh; each process copies to its devices what they hold."""
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def spread(self, tree: Any, axis: int = 0) -> Any:
        """Under jit: each device goes on with its share of the examples along axis."""
        return self.constrain(tree, PartitionSpec(*[None] * axis, DATA))

    def replicate(self, tree: Any) -> Any:
        """Under jit: each device goes on with all of it."""
        return self.constrain(tree, PartitionSpec())

    def constrain(self, tree: Any, spec: PartitionSpec) -> Any:
        """Under jit: the arrays of a tree, placed so."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))


ONE_DEVICE = Placement()


def make_placement(devices: int | None) -> Placement:
    """A mesh of that many devices, in equal parts from all processes.

    Args:
        devices: how many; None for one, or, where there are several processes, for all.

    Raises:
        ValueError: there are not as many here, or the processes cannot have equal parts.
    """
    (here,) = jnp.zeros(()).devices()  # where new arrays go, which --device may have changed
    platform = here.platform
    processes = jax.process_count()
    if processes == 1 and devices in (None, 1):
        return ONE_DEVICE
    present = jax.devices(platform)
    devices = len(present) if devices is None else devices
    if devices % processes:
        raise ValueError(
            f"--devices {devices}: must be a multiple of {processes}, the number of processes"
        )
    if devices > len(present):
        raise ValueError(
            f"--devices {devices}: JAX has {len(present)} of kind {platform} here; choose fewer, "
            "or, to split the CPU, --device cpu before JAX is in use"
        )
    each = devices // processes
    chosen = [[d for d in present if d.process_index == p][:each] for p in range(processes)]
    return Placement(Mesh(np.asarray(chosen).reshape(-1), (DATA,)))
