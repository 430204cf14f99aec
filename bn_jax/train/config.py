"""All settings of a training run, checked; the defaults are the paper's experiment."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from bn_jax.train.flags import check_fields, out_of_range
from bn_jax.train.grid import LIMITS, Grid
from bn_jax.train.settings import NormalizationSettings

Arm = Literal["batch", "none"]

USED_BY = {
    "hidden": "the mlp uses it",
    "filters": "cnn and tower use it",
    "blocks": "the tower uses it",
    "activation": "mlp and cnn use it",
    "placement": "mlp and cnn use it",
}
"""Settings that only some models use, and these models."""

STATED = ("dataset", "model", "hidden", "activation", "placement", "batch_size", "optimizer")
STATED += ("schedule", "weight_decay", "micro_batches", "group_size", "renorm", "precision")
STATED += ("classes_per_batch",)
"""Settings that the paper states for its experiment, or that it does not know."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Grid):
    """A training run; the defaults are section 4.1 of Ioffe & Szegedy (2015).

    The paper gives the network, 50,000 steps of 60 examples and a binary input. It does not give
    the learning rate, the initial standard deviation, epsilon, or how the input is made binary.
    Those defaults are from a small grid (standard deviation 0.02 to 0.05, rate 0.1 to 0.3,
    threshold or stochastic). With batch norm they reach 0.95 after about 4,500 steps (less than
    4,000 in the paper's Figure 1(a)), and without after 15,000 (14,600).

    `settings` and `grid` describe the fields.

    Raises:
        ValueError: a value is out of range, with the field's name and what it may be.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        most = 2**32 - self.seed
        self.demand("seeds", self.seeds <= most, f"at most {most} for --seed {self.seed}")
        fits = self.placement == "pre-activation" or self.model != "tower"
        self.demand("placement", fits, "pre-activation for the tower, whose blocks fix it")
        for values in self.grid if self.over else ():
            cell = self.with_values({"over": (), "seeds": 1, "devices": None} | values)
            dataclasses.replace(cell)  # which checks it
        self.check_parts()

    def check_parts(self) -> None:
        """Refuse to split a batch into unequal parts, or into parts too small for statistics."""
        batch, parts, group, devices = (
            getattr(self, n) for n in ("batch_size", "micro_batches", "group_size", "devices")
        )
        # The tower's features are maps: even one example has many values of each.
        least = 1 if self.norm == "none" or self.model == "tower" else 2
        fits, part = batch >= least, batch // parts
        self.demand("batch_size", fits, "at least 2 with batch norm: one example has no variance")
        rule = f"a divisor of --batch-size {batch}"
        self.demand("micro_batches", batch % parts == 0, rule)
        self.demand("classes_per_batch", batch % (self.classes_per_batch or 1) == 0, rule)
        rule = f"at most {batch // 2} for --batch-size {batch}: one example has no variance"
        self.demand("micro_batches", part >= least, rule)
        if group is not None:
            passes = f"--batch-size {batch}" + f" in --micro-batches {parts}" * (parts > 1)
            self.demand("group_size", group <= part, f"at most {part}, for {passes}")
            smallest = min(group, part % group or group)
            rule = f"such that no example is left alone, without variance, for {passes}"
            self.demand("group_size", smallest >= least, rule)
            self.demand("group_size", self.renorm is None, "left out with --renorm")
        if devices is not None and not self.splits_runs:
            unit = devices * parts
            near = sorted({max(batch // unit, 1) * unit, -(-batch // unit) * unit})
            rule = f"a multiple of --devices {devices}"
            rule += f" times --micro-batches {parts}" * (parts > 1)
            rule += f", e.g. {' or '.join(map(str, near))}"
            self.demand("batch_size", batch % unit == 0, rule)

    def demand(self, name: str, satisfied: bool, rule: str) -> None:
        """Unless satisfied, raise a ValueError that names the field, its value and the rule."""
        if not satisfied:
            raise out_of_range(name, getattr(self, name), rule)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The normalizations to train with, in order."""
        return ("batch", "none") if self.norm == "both" else (self.norm,)

    @property
    def is_papers(self) -> bool:
        """Whether this is the experiment of section 4.1, as far as the paper describes it."""
        same = all(getattr(self, name) == getattr(TrainConfig, name) for name in STATED)
        return same and self.binarization != "none"

    @property
    def unused(self) -> dict[str, str]:
        """The fields that have no effect on this run, each with the reason."""
        reasons = {
            name: f"--model {self.model}; only {models}"
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
