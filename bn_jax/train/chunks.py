"""How many steps one compiled call takes: few enough to stop a run, and to show how it goes.

The sizes depend on the network and on the kind of device, not on measured time: several processes
must make the same calls, and a run that is repeated must give the same bytes.
"""

import itertools
from typing import Any

import jax
import numpy as np

from bn_jax.train.state import TrainState
from bn_jax.train.step import TrainStep

OPERATIONS = {"cpu": 2e10}
"""Floating-point operations that a call of several steps may have.

Two cores make 4·10¹⁰ (cnn) to 10¹¹ (tower) per second. A call allocates its memory once, so that
the tower's step takes 24 to 27 ms in calls of 8 steps, and 36 to 65 ms in calls of one.
"""

OPERATIONS_ELSEWHERE = 2e11
"""On a GPU or TPU."""

STEPS = 1000
"""Steps that a call may have, however short: they take 0.05 ms or more."""


def steps_per_call(train_step: TrainStep, state: TrainState, images: np.ndarray) -> int:
    """How many steps on a batch of such images one compiled call may take."""
    (device, *_) = state.step.devices()
    labels = np.zeros(len(images), np.int32)
    lowered = jax.jit(train_step).lower(jax.eval_shape(lambda: state), images, labels)
    costs: Any = lowered.cost_analysis() or {}  # not every backend counts
    operations = costs.get("flops", 0)
    if operations <= 0:
        return STEPS
    most = OPERATIONS.get(device.platform, OPERATIONS_ELSEWHERE) / operations
    return int(min(max(most, 1), STEPS))


def split(steps: int, most: int) -> list[int]:
    """Steps as calls of at most so many: equal ones if possible, which one compilation serves."""
    least = -(-steps // most)
    calls = next((n for n in range(least, 2 * least) if steps % n == 0), least)
    size, rest = divmod(steps, calls)
    return [size + 1] * rest + [size] * (calls - rest)


def next_call(step: int, steps: int, every: int, most: int) -> int:
    """How many steps to take next, such that an evaluation can follow after every so many.

    A function of the step alone: a run that is resumed makes the same calls.
    """
    start = step - step % every
    ends = itertools.accumulate(split(min(every, steps - start), most), initial=start)
    return next(end for end in ends if end > step) - step
