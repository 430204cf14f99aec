"""A training state with the counts of its steps; a step that is not finite is undone.

    trusting   takes steps as they come, at no cost; `is_finite` tells afterwards if all were good
    careful    undoes a bad step, at the cost of another look at every parameter

The loop trusts. If the state after a compiled call is not finite, the loop repeats the call with
care. No bad step is missed, as its NaN or infinity stays in the parameters or the optimizer.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from bn_jax.train.config import TrainConfig
from bn_jax.train.state import Images, Labels, TrainState
from bn_jax.train.step import TrainStep


class Progress(NamedTuple):
    """All that is needed to go on, and what the next evaluation will report.

    Where several seeds are trained at once, each array has a leading axis of them.
    """

    state: TrainState  # after the last good step
    loss: Float[Array, "*seeds"]  # sum over the good steps since the last evaluation
    good: Int[Array, "*seeds"]  # how many these are
    bad: Int[Array, "*seeds"]  # steps since then whose loss, gradients or state were not finite
    # Bad steps since the last good one, evaluations or not; without those that made the loss scale
    # of float16 smaller, as the next step may then be good.
    in_a_row: Int[Array, "*seeds"]

    @property
    def step(self) -> int:
        """Steps taken, by the seed that has come furthest."""
        return int(np.max(self.state.step))

    def is_over(self, config: TrainConfig) -> bool:
        """Whether all steps are taken, or all runs have diverged."""
        return self.step >= config.steps or bool(self.diverged(config.max_bad_steps).all())

    @property
    def was_bad(self) -> bool:
        """Whether a step was bad, since the last evaluation or right before it."""
        return bool(np.any(self.bad) or np.any(self.in_a_row))

    def diverged(self, limit: int) -> np.ndarray:
        """Which runs have taken so many bad steps in a row that they have ended."""
        return np.asarray(self.in_a_row) >= limit

    @property
    def reported_until(self) -> list[int]:
        """The step of each seed's last evaluation."""
        return np.ravel(self.state.step - self.good - self.bad).tolist()

    def reported(self) -> "Progress":
        """The same after an evaluation."""
        return self._replace(**{n: 0 * getattr(self, n) for n in ("loss", "good", "bad")})


Take = Callable[[TrainStep, Progress, Images, Labels], Progress]
"""How to take a step."""


def begin(state: TrainState) -> Progress:
    """Before the first step."""
    zero = jnp.zeros_like(state.step)
    return Progress(state, jnp.zeros(zero.shape, jnp.float32), zero, zero, zero)


def trusting(train_step: TrainStep, progress: Progress, images: Images, labels: Labels) -> Progress:
    """Take a step whatever comes of it."""
    state, loss = train_step(progress.state, images, labels)
    return progress._replace(state=state, loss=progress.loss + loss, good=progress.good + 1)


def careful(limit: int) -> Take:
    """A `Take` that undoes a step that is not finite, and stops after `limit` of them in a row.

    Parameters, statistics and the optimizer's state are undone together. Its batch is skipped.
    """

    def take(train_step: TrainStep, progress: Progress, images: Images, labels: Labels) -> Progress:
        taken = trusting(train_step, progress, images, labels)
        before, after = progress.state.loss_scale, taken.state.loss_scale
        answered = before is not None and after is not None and after.scale < before.scale
        undone = progress._replace(
            state=progress.state._replace(step=taken.state.step, loss_scale=after),
            bad=progress.bad + 1,
            in_a_row=progress.in_a_row + jnp.where(answered, 0, 1),
        )
        taken = taken._replace(in_a_row=jnp.zeros_like(progress.in_a_row))
        good, going = is_finite(taken), progress.in_a_row < limit
        return jax.tree.map(
            lambda old, new, back: jnp.where(going, jnp.where(good, new, back), old),
            *(progress, taken, undone),
        )

    return take


def is_finite(tree: object) -> Bool[Array, ""]:
    """Whether every number of a tree is finite."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
