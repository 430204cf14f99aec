"""From numbers per feature to a table, a verdict, and what to do."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bn_jax.explain.causes import CAUSES, Api, Cause
from bn_jax.explain.compare import Comparison
from bn_jax.explain.likeness import Likeness

NUMBERS = ("change", "distance", "noise", "purity", "shift", "epsilon")
COUNTS = ("dead", "exploding", "new", "broken", "unknown")
SMALL = 0.05  # a change that is said only where scores differ; from 0.15 on it is a cause
GAIN = 0.005  # by chance, where 200 of 10,000 images change sides, scores differ by 0.0014 (1 σ)


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer in numbers, and how many of its features are conspicuous.

    `distance`, `noise`, `purity`, `shift`, `epsilon` and `excess` are medians over live features.

    Attributes:
        change: by how many standard deviations the layer's output changes, before scale and bias,
            where the running statistics take the place of the data's: the root mean square over
            live features, without `rare` ones.
        distance: J of the running statistics and the training data.
        ratio: distance over noise.
        noise: what J a single batch's statistics would have: how much training differs from
            inference through the batch alone.
        purity: how much more the batches' means vary than by chance; about 1 for batches drawn at
            random.
        shift: J of the evaluation data and the training data, or NaN.
        epsilon: the share of ε in σ² + ε.
        excess: the logarithm of the running variance over the data's.
        features: how many.
        dead: of these, how many have no variance beside that of the others (10⁻⁸ of the median).
        exploding: how many have a variance of more than 10⁸ times the median.
        new: how many have statistics as before the first batch.
        broken: how many have statistics that are not finite, or a negative variance.
        unknown: for how many the training data are not finite.
        young: the share of the initial 0 and 1 in the running statistics, where that explains them.
        likeness: of the running statistics to those of a single batch.
        of_features: the numbers of each feature.
    """

    change: float
    distance: float
    ratio: float
    noise: float
    purity: float
    shift: float
    epsilon: float
    excess: float
    features: int
    dead: int
    exploding: int
    new: int
    broken: int
    unknown: int
    young: float
    likeness: Likeness
    of_features: Comparison = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A cause, and the layers where it was found."""

    cause: Cause
    layers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found; print it for the table and the verdict.

    Attributes:
        rows: one for each layer, by its name.
        findings: the causes found, the most telling first; none is "nothing wrong".
        api: what remedies are written for.
        scores: accuracies by the statistics that normalize, if they were measured.
    """

    rows: Mapping[str, Row]
    findings: tuple[Finding, ...]
    api: Api = "functional"
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One sentence on the first cause."""
        if not self.findings and (change := self.small_lag):
            gain = self.scores["population"] - self.scores["running"]
            return (
                f"The running statistics lag a little (change {change:.2g}): the population's "
                f"score {gain:.4f} more. More steps or a learning rate that falls at the end would "
                "help."
            )
        if not self.findings:
            return "Nothing wrong: the running statistics are those of the training data."
        cause, layers, of = self.findings[0].cause, self.findings[0].layers, len(self.rows)
        label = dict(zip(self.rows, short(self.rows), strict=True))
        where = f" ({', '.join(label[name] for name in layers)})" if layers else ""
        if len(layers) == of or len(layers) > 3:
            where = " (all layers)" if len(layers) == of else f" ({len(layers)} of {of} layers)"
        return f"{cause.name}{where}: {cause.says}."

    @property
    def small_lag(self) -> float:
        """The largest change of a layer, if it is small and the scores are worse for it; else 0."""
        gain = self.scores.get("population", 0.0) - self.scores.get("running", 0.0)
        change = max((row.change for row in self.rows.values()), default=0.0)
        return change if gain > GAIN and change > SMALL else 0.0

    @property
    def remedy(self) -> str:
        """What to do about the first cause: lines of code, none if nothing is wrong."""
        return self.findings[0].cause.remedy[self.api] if self.findings else ""

    @property
    def verdict(self) -> str:
        """The first cause, its remedy, and the names of the other causes."""
        parts = [self.summary]
        if self.findings:
            parts += ["Remedy:", textwrap.indent(self.remedy, "    ")]
        if others := [finding.cause.name for finding in self.findings[1:]]:
            parts.append(f"Also: {', '.join(others)}.")
        return "\n".join(parts)

    def __str__(self) -> str:
        labels = short(self.rows)
        width = max(map(len, ("layer", *labels)))
        lines = [f"{'layer':{width}} " + "".join(f"{n:>9}" for n in NUMBERS) + "  features"]
        for label, row in zip(labels, self.rows.values(), strict=True):
            numbers = "".join(f"{getattr(row, name):9.2g}" for name in NUMBERS)
            counts = [f"{count} {name}" for name in COUNTS if (count := getattr(row, name))]
            of = f": {', '.join(counts)}" if counts else ""
            lines.append(f"{label:{width}} {numbers}  {row.features}{of}")
        if self.scores:
            scores = ", ".join(f"{value:.4f} {name}" for name, value in self.scores.items())
            lines += ["", f"accuracy by statistics: {scores}"]
        return "\n".join([*lines, "", self.verdict])

    def plot(self, path: str | Path | None = None) -> Any:
        """A picture of it: how far each layer's statistics are off, and the accuracies.

        Args:
            path: where to write it as a PNG; a whole file, or none.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from bn_jax.explain.picture import draw, to_png
        from bn_jax.files import write_whole

        figure = draw({"": self})
        if path is not None:
            write_whole(Path(path), to_png(figure))
        return figure

    def _repr_png_(self) -> bytes | None:
        """The picture, where Jupyter shows a report; None without matplotlib."""
        from bn_jax.explain.picture import draw, to_png

        with contextlib.suppress(ImportError):
            return to_png(draw({"": self}))
        return None


def short(names: Iterable[str]) -> list[str]:
    """The names of layers without a last part that all have, such as BatchNorm_0."""
    heads, _, tails = zip(*(name.rpartition(".") for name in names), strict=True)
    return list(heads) if len({*tails}) == 1 and all(heads) else list(names)


def summarize(layer: Comparison) -> Row:
    """A layer's row."""
    live = layer.known & layer.finite & ~layer.dead

    def middle(values: np.ndarray) -> float:
        return float(np.median(values[live])) if live.any() else float("nan")

    usual = live & ~layer.rare if (live & ~layer.rare).any() else live
    noise, distance = middle(layer.noise), middle(layer.distance)
    return Row(
        change=float(np.sqrt(np.mean(layer.change[usual] ** 2))) if live.any() else float("nan"),
        distance=distance,
        ratio=distance / noise if noise > 0 else float("nan"),
        noise=noise,
        purity=middle(layer.purity),
        shift=middle(layer.shift),
        epsilon=middle(layer.epsilon),
        excess=middle(layer.excess),
        features=len(layer.known),
        dead=int(layer.dead.sum()),
        exploding=int(layer.exploding.sum()),
        new=int(layer.new.sum()),
        broken=int((~layer.finite).sum()),
        unknown=int((~layer.known).sum()),
        young=layer.young,
        likeness=layer.likeness,
        of_features=layer,
    )


def judge(rows: Mapping[str, Row], api: Api = "functional", first: Cause | None = None) -> Report:
    """The causes that the rows show, after one that was found otherwise."""
    findings = [] if first is None else [Finding(first, ())]
    for cause in CAUSES:
        layers = tuple(name for name, row in rows.items() if cause.found(row))
        together = cause.together is None or cause.together(list(rows.values()))
        explained = cause.differ and any(finding.cause.differ for finding in findings)
        if layers and together and not explained:
            findings.append(Finding(cause, layers))
    return Report(rows, tuple(findings), api)
