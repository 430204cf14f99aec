"""What a claim has to work with: the data, how many seeds and steps, and whom to tell."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bn_jax.data import Dataset
from bn_jax.reproduce import training


@dataclasses.dataclass(frozen=True)
class Study:
    """The conditions of all claims.

    Attributes:
        data: MNIST.
        seeds: of each method; at least five where results are evidence.
        quick: whether to take a few steps only, to see that everything works.
        watch: is told what is trained, the steps taken, and how many there are.
    """

    data: Dataset
    seeds: int = 5
    quick: bool = False
    watch: Callable[[str, int, int], None] = lambda *_: None

    def steps(self, steps: int, every: int) -> tuple[int, int]:
        """How many steps to take, and after how many to measure; few where it is to be quick."""
        return (4, 2) if self.quick else (steps, every)

    def train(self, what: str, runs: training.Run, loss: training.Loss, **options: Any) -> Any:
        """`training.train` with progress under a name."""
        steps, every = self.steps(options.pop("steps"), options.pop("every"))
        self.watch(what, 0, steps)
        data = self.arrays
        rows = options.pop("rows", None)
        rows = rows or training.shuffled(options.pop("batch_size", 60), len(data.images))
        return training.train(
            *(runs, loss, data),
            **{"rows": rows, "every": every, "steps": steps},
            watch=lambda done: self.watch(what, done, steps),
            **options,
        )

    @property
    def arrays(self) -> training.Data:
        """The data on the device; where it is to be quick, some of the test images."""
        images, labels, test_images, test_labels = self.data
        if self.quick:
            test_images, test_labels = test_images[:400], test_labels[:400]
        return training.Data(
            jnp.asarray(images.reshape(len(images), -1)),
            jnp.asarray(labels, jnp.int32),
            jnp.asarray(test_images.reshape(len(test_images), -1)),
            jnp.asarray(test_labels, jnp.int32),
        )
