"""All settings of a training run; the defaults are the paper's experiment."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bn_jax.train.flags import check_fields, dashed, is_tuple, out_of_range
from bn_jax.train.settings import (
    DataSettings,
    ModelSettings,
    NormalizationSettings,
    OptimizerSettings,
    RunSettings,
)

Arm = Literal["batch", "none"]
LIMITS = ("r_max", "d_max")
"""The numbers of `renorm`; a grid may have several values of each."""

SWEPT = ("learning_rate", "init_std", "decay", "epsilon", "weight_decay", *LIMITS)
"""Numbers that `--over` can sweep; beside the seed, these may differ within a compiled program."""

USED_BY = {
    "hidden": ("mlp",),
    "filters": ("cnn", "tower"),
    "blocks": ("tower",),
    "activation": ("mlp", "cnn"),
    "placement": ("mlp", "cnn"),
}
"""Settings that only some models use, and these models."""


# A dataclass takes its fields from the last base first: data, model, normalization, and so on.
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunSettings, OptimizerSettings, NormalizationSettings, ModelSettings, DataSettings
):
    """A training run; the defaults are section 4.1 of Ioffe & Szegedy (2015).

    The paper gives the network, 50,000 steps of 60 examples and a binary input. It does not give
    the learning rate, the initial standard deviation, epsilon, or how the input is made binary.
    Those defaults are from a small grid (standard deviation 0.02 to 0.05, rate 0.1 to 0.3,
    threshold or stochastic). With batch norm they reach 0.95 after about 4,500 steps (less than
    4,000 in the paper's Figure 1(a)), and without after 15,000 (14,600).

    `settings` describes the other fields.

    Attributes:
        over: the numbers to sweep, and their values, as in ("learning-rate=0.1,0.3",).

    Raises:
        ValueError: a value is out of range, with the field's name and what it may be.
    """

    over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        most = 2**32 - self.seed
        self.demand("seeds", self.seeds <= most, f"at most {most} for --seed {self.seed}")
        fits = self.placement == "pre-activation" or self.model != "tower"
        self.demand("placement", fits, "pre-activation for the tower, whose blocks fix it")
        self.check_axes()
        self.check_parts()

    def check_parts(self) -> None:
        """Refuse to split a batch into unequal parts, or into parts too small for statistics."""
        batch, group, micro_batches = self.batch_size, self.group_size, self.micro_batches
        # The tower's features are maps: even one example has many values of each.
        one_will_do = self.norm == "none" or self.model == "tower"
        fits = batch > 1 or one_will_do
        self.demand("batch_size", fits, "at least 2 with batch norm: one example has no variance")
        part, rest = divmod(batch, micro_batches)
        self.demand("micro_batches", not rest, f"a divisor of --batch-size {batch}")
        rule = f"at most {batch // 2} for --batch-size {batch}: one example has no variance"
        self.demand("micro_batches", part > 1 or one_will_do, rule)
        several = micro_batches > 1
        if group is not None:
            passes = f"--batch-size {batch}"
            passes += f" in --micro-batches {micro_batches}" if several else ""
            self.demand("group_size", group <= part, f"at most {part}, for {passes}")
            alone = min(group, part % group or group) == 1
            rule = f"such that no example is left alone, without variance, for {passes}"
            self.demand("group_size", not alone or one_will_do, rule)
            self.demand("group_size", self.renorm is None, "left out with --renorm")
        if self.devices is not None and not self.splits_runs:
            share = self.devices * micro_batches
            near = sorted({max(batch // share, 1) * share, -(-batch // share) * share})
            by = f" times --micro-batches {micro_batches}" if several else ""
            rule = f"a multiple of --devices {self.devices}{by}, e.g. {' or '.join(map(str, near))}"
            self.demand("batch_size", not batch % share, rule)

    def check_axes(self) -> None:
        """Refuse a sweep of what cannot be swept, and values that no single run could have."""
        rule = f"NAME=NUMBER,NUMBER,… with NAME one of {', '.join(map(dashed, SWEPT))}"
        self.demand("over", is_tuple(self.over, lambda axis: isinstance(axis, str)), rule)
        try:
            axes = self.swept
        except ValueError:
            axes = {}
        fits = len(axes) == len(self.over) and {*axes} <= {*SWEPT}
        fits &= all(len({*values}) == len(values) for values in axes.values())
        self.demand("over", fits, rule)
        for values in self.grid if self.over else ():
            cell = self.with_values({"over": (), "seeds": 1, "devices": None} | values)
            dataclasses.replace(cell)  # which checks it

    def demand(self, name: str, satisfied: bool, rule: str) -> None:
        """Unless satisfied, raise a ValueError that names the field, its value and the rule."""
        if not satisfied:
            raise out_of_range(name, getattr(self, name), rule)

    @property
    def swept(self) -> dict[str, tuple[float, ...]]:
        """The numbers that `over` sweeps, and their values."""
        pairs = (axis.partition("=") for axis in self.over)
        return {
            name.replace("-", "_"): tuple(map(float, values.split(",")))
            for name, _, values in pairs
        }

    @property
    def axes(self) -> dict[str, tuple[float, ...]]:
        """All numbers with several values, and these values; the decay comes last."""
        axes = self.swept
        decay = axes.pop("decay", self.decay)
        return axes | ({"decay": decay} if isinstance(decay, tuple) else {})

    @property
    def decays(self) -> int:
        """How many moving averages one run carries, each with its own decay.

        Training does not read them, except with renorm, where each decay needs its own run.
        """
        reads = self.renorm or {*LIMITS} & {*self.swept}
        return 1 if reads else len(self.axes.get("decay", "1"))

    @property
    def grid(self) -> list[dict[str, float]]:
        """All combinations of the values of the axes; without axes, one that is empty."""
        return combinations(self.axes)

    @property
    def runs(self) -> list["TrainConfig"]:
        """The runs to train: each combination with each seed.

        Combinations that differ in the decay alone share a run, which has the first decay.
        """
        one = {"over": (), "seeds": 1}
        return [
            self.with_values(one | values | {"seed": seed})
            for values in self.grid[:: self.decays]
            for seed in self.all_seeds
        ]

    @property
    def splits_runs(self) -> bool:
        """Whether the devices share the runs between them; else they share each batch."""
        runs = len(self.grid[:: self.decays]) * self.seeds
        return self.devices is not None and runs > 1 and runs % self.devices == 0

    @property
    def names(self) -> list[tuple[int, int]]:
        """The place in `grid` and the seed of each average of each run, as they are evaluated."""
        return [
            (i // self.seeds * self.decays + average, run.seed)
            for i, run in enumerate(self.runs)
            for average in range(self.decays)
        ]

    def with_values(self, values: Mapping[str, Any]) -> "TrainConfig":
        """A copy with other values, which may be traced and are not checked."""
        other = copy.copy(self)
        limits = {name: getattr(self, name) for name in LIMITS}
        if {*limits} & {*values}:
            renorm = tuple(values.get(name, limit) for name, limit in limits.items())
            values = {name: values[name] for name in values if name not in limits}
            values |= {"renorm": renorm}
        for name, value in values.items():
            object.__setattr__(other, name, value)
        return other

    @property
    def r_max(self) -> float:
        """The limit of renorm's scale; 1 corrects nothing."""
        return self.renorm[0] if self.renorm else 1.0

    @property
    def d_max(self) -> float:
        """The limit of renorm's shift; 0 corrects nothing."""
        return self.renorm[1] if self.renorm else 0.0

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The normalizations to train with, in order."""
        return ("batch", "none") if self.norm == "both" else (self.norm,)

    @property
    def all_seeds(self) -> range:
        """The seeds, which are trained at once."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def is_papers(self) -> bool:
        """Whether this is the experiment of section 4.1, as far as the paper describes it."""
        stated = ("dataset", "model", "hidden", "activation", "placement", "batch_size")
        stated += ("optimizer", "schedule", "weight_decay", "micro_batches", "group_size")
        stated += ("renorm", "precision")
        same = all(getattr(self, name) == getattr(TrainConfig, name) for name in stated)
        return same and self.binarization != "none"

    @property
    def unused(self) -> dict[str, str]:
        """The fields that have no effect on this run, each with the reason."""
        reasons = {
            name: f"--model {self.model}; only {' and '.join(models)} use it"
            if len(models) > 1
            else f"--model {self.model}; only the {models[0]} uses it"
            for name, models in USED_BY.items()
            if self.model not in models
        }
        if self.average == "cumulative":
            reasons["decay"] = "--average cumulative, which weighs all steps alike"
        if self.norm == "none":
            fields = dataclasses.fields(NormalizationSettings)
            names = {field.name for field in fields} | {*LIMITS}
            reasons |= dict.fromkeys(names - {"norm"}, "--norm none")
        return reasons

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """The configuration that `to_json` wrote; checked like any other.

        Raises:
            ValueError: the text is not a JSON object, or has a field that does not exist or is
                out of range.
        """
        fields: dict[str, Any] = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("the configuration is not a JSON object")
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r} in the configuration")
        # JSON has neither paths nor tuples.
        for name, value in fields.items():
            if isinstance(value, list):
                fields[name] = tuple(value)
            elif isinstance(value, str) and name in ("data_dir", "run_dir"):
                fields[name] = Path(value)
        return cls(**fields)


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of a value of each axis."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
