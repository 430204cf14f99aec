"""The runs of one program: all combinations of the values of some numbers, each with every seed."""

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Self

from bn_jax.train.flags import Must, dashed, is_tuple
from bn_jax.train.settings import (
    DataSettings,
    ModelSettings,
    NormalizationSettings,
    OptimizerSettings,
    RunSettings,
)

LIMITS = ("r_max", "d_max")
"""The numbers of `renorm`; a grid may have several values of each."""

SWEPT = ("learning_rate", "init_std", "decay", "epsilon", "weight_decay", *LIMITS)
"""Numbers that `--over` can sweep; beside the seed, these may differ within a compiled program."""

Axes = dict[str, tuple[float, ...]]


def read_axes(over: tuple[str, ...]) -> Axes:
    """The numbers that a sweep is over, and their values."""
    pairs = (axis.partition("=") for axis in over)
    return {
        name.replace("-", "_"): tuple(map(float, values.split(","))) for name, _, values in pairs
    }


def are_axes(over: Any) -> bool:
    """Whether a value is what a sweep may be over."""
    if not is_tuple(over, lambda axis: isinstance(axis, str)):
        return False
    try:
        axes = read_axes(over)
    except ValueError:  # not a number
        return False
    different = all(len({*values}) == len(values) for values in axes.values())
    return len(axes) == len(over) and {*axes} <= {*SWEPT} and different


# A dataclass takes its fields from the last base first: data, model, normalization, and so on.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(RunSettings, OptimizerSettings, NormalizationSettings, ModelSettings, DataSettings):
    """All settings, some with several values.

    Combinations that differ in the decay alone share a run, which carries an average for each:
    training does not read them. With renorm it does, and each decay needs its own run.

    Attributes:
        over: the numbers to sweep, and their values, as in ("learning-rate=0.1,0.3",).
    """

    over: Annotated[
        tuple[str, ...],
        Must(f"NAME=NUMBER,NUMBER,… with NAME one of {', '.join(map(dashed, SWEPT))}", are_axes),
    ] = ()

    @property
    def axes(self) -> Axes:
        """All numbers with several values, and these values; the decay comes last."""
        axes = read_axes(self.over)
        decay = axes.pop("decay", self.decay)
        return axes | ({"decay": decay} if isinstance(decay, tuple) else {})

    @property
    def decays(self) -> int:
        """How many moving averages one run carries, each with its own decay."""
        axes = self.axes
        return 1 if self.renorm or {*LIMITS} & {*axes} else len(axes.get("decay", (0,)))

    @property
    def grid(self) -> list[dict[str, float]]:
        """All combinations of the values of the axes; without axes, one that is empty."""
        names, values = self.axes.keys(), itertools.product(*self.axes.values())
        return [dict(zip(names, some, strict=True)) for some in values]

    @property
    def all_seeds(self) -> range:
        """The seeds, which are trained at once."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def runs(self) -> list[Self]:
        """The runs to train; one that carries several averages has the first decay."""
        one = {"over": (), "seeds": 1}
        return [
            self.with_values(one | values | {"seed": seed})
            for values in self.grid[:: self.decays]
            for seed in self.all_seeds
        ]

    @property
    def names(self) -> list[tuple[int, int]]:
        """The place in `grid` and the seed of each average of each run, as they are evaluated."""
        return [
            (first + average, seed)
            for first in range(0, len(self.grid), self.decays)
            for seed in self.all_seeds
            for average in range(self.decays)
        ]

    @property
    def splits_runs(self) -> bool:
        """Whether the devices share the runs between them; else they share each batch."""
        runs = len(self.grid) // self.decays * self.seeds
        return self.devices is not None and runs > 1 and runs % self.devices == 0

    @property
    def limits(self) -> dict[str, float]:
        """The limits of renorm's scale and shift; those of no renorm correct nothing."""
        return dict(zip(LIMITS, self.renorm or (1.0, 0.0), strict=True))

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values, which may be traced and are not checked."""
        other, values = copy.copy(self), dict(values)
        if {*LIMITS} & {*values}:
            values["renorm"] = tuple(values.pop(*limit) for limit in self.limits.items())
        for name, value in values.items():
            object.__setattr__(other, name, value)
        return other
