"""Known bugs of batch norms, as what they compute.

A result that is wrong is compared with what each known bug makes of the same inputs. Where they
agree, the bug has a name. Cancelling variance is not here: its errors are of rounding, and differ
between implementations; `judge` tells it by contrast, and so what half precision does.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bn_jax.conform import conventions, oracle
from bn_jax.conform.vectors import Vector

Suspected = list[tuple[str, np.ndarray]]
"""The bugs that a result may have, and what it is then."""

Suspects = dict[str, Suspected]

EPSILON_MISSING = "ε is missing"
EPSILON_OUTSIDE = "ε is outside of the root, σ + ε instead of √(σ² + ε)"
BY_VARIANCE = "divides by the variance, not by its root"
MASK_IGNORED = "the mask is ignored"
FULL_COUNT = "masked sums are divided by the full count"
WRONG_AXIS = "normalizes over the wrong axis"


def of(vector: Vector, call: str) -> Suspects:
    """What known bugs make of a vector's inputs."""
    find = {
        "batch_norm": forward,
        "gradient": backward,
        "infer": inference,
        "running": running,
        "sharded": sharded,
        "renorm": renorm,
    }[call]
    found: Suspects = {}
    with np.errstate(all="ignore"):
        for quantity, name, value in find(vector):
            found.setdefault(quantity, []).append((name, np.asarray(value, np.float64)))
    return found


Findings = Iterator[tuple[str, str, Any]]


class Parts:
    """The parts of a training step, by the names of the paper."""

    def __init__(self, vector: Vector):
        given = vector.inputs
        self.x = np.asarray(given["x"], np.float64)
        self.scale, self.bias, self.epsilon = given["scale"], given["bias"], given["epsilon"]
        self.dy, self.batch = given.get("dy"), tuple(range(self.x.ndim - 1))
        self.mask = given.get("mask")
        self.weights = np.ones_like(self.x)
        if self.mask is not None:
            self.weights = np.where(np.expand_dims(self.mask, -1), self.weights, 0)
        f = oracle.forward(self.x, epsilon=self.epsilon, weights=self.mask)
        self.mean, self.var, self.count = f.mean, f.var, f.count
        self.bessel = f.count / np.maximum(f.count - 1, 1)
        self.full = self.x.size / self.x.shape[-1]
        self.std = np.sqrt(f.var + self.epsilon)
        self.normalized = f.normalized

    def y(self, normalized: Any) -> np.ndarray:
        """The affine map."""
        return self.scale * normalized + self.bias

    def whitened(self, mean: Any, var: Any) -> np.ndarray:
        """Y by other statistics."""
        return self.y((self.x - mean) / np.sqrt(var + self.epsilon))


def forward(vector: Vector) -> Findings:
    """Bugs of y, mean and var in training."""
    p = Parts(vector)
    centered = p.x - p.mean
    yield "y", "normalizes by the unbiased variance", p.whitened(p.mean, p.var * p.bessel)
    yield "y", EPSILON_OUTSIDE, p.y(centered / (np.sqrt(p.var) + p.epsilon))
    yield "y", EPSILON_MISSING, p.y(centered / np.sqrt(p.var))
    yield "y", BY_VARIANCE, p.y(centered / (p.var + p.epsilon))
    yield "y", "the mean is not subtracted", p.y(p.x / p.std)
    yield "y", "scale and bias are swapped", p.bias * p.normalized + p.scale
    yield "y", "scale is ignored", p.normalized + p.bias
    yield "y", "bias is ignored", p.scale * p.normalized
    yield "y", "multiplies by 1 + scale", p.y(p.normalized) + p.normalized
    rows = p.x.mean(-1, keepdims=True), p.x.var(-1, keepdims=True)
    yield "y", WRONG_AXIS, p.whitened(*rows)
    if p.x.shape[0] == p.x.shape[-1] and p.x.ndim == 2:
        yield "mean", WRONG_AXIS, rows[0].squeeze(-1)
        yield "var", WRONG_AXIS, rows[1].squeeze(-1)
    if p.x.ndim > 2:
        first, places = p.x.mean(0, keepdims=True), tuple(range(1, p.x.ndim - 1))
        name = "each position of an image is normalized by itself"
        yield "y", name, p.whitened(first, p.x.var(0, keepdims=True))
        name = "each image is normalized by itself"
        yield "y", name, p.whitened(p.x.mean(places, keepdims=True), p.x.var(places, keepdims=True))
    yield "var", "the unbiased variance is returned as the batch's", p.var * p.bessel
    yield "var", "the standard deviation is returned as the variance", np.sqrt(p.var)
    yield "var", "the variance is returned with ε added", p.var + p.epsilon
    yield "var", "1/√(σ² + ε) is returned as the variance", 1 / p.std
    if p.mask is not None:
        total = np.where(p.weights > 0, p.x, 0)
        less = total.sum(p.batch) / p.full
        squares = np.where(p.weights > 0, (p.x - less) ** 2, 0).sum(p.batch)
        everything = p.x.mean(p.batch), p.x.var(p.batch)
        around = {
            MASK_IGNORED: everything,
            FULL_COUNT: (less, squares / p.full),
            f"{FULL_COUNT}, in the mean": (less, squares / p.count),
            f"{FULL_COUNT}, in the variance": (p.mean, p.var * p.count / p.full),
            "masked-out values count as zeros": (less, total.var(p.batch)),
        }
        for name, (mean, var) in around.items():
            yield "mean", name, mean
            yield "var", name, var
            yield "y", name, p.whitened(mean, var)


def backward(vector: Vector) -> Findings:
    """Bugs of the gradients."""
    p = Parts(vector)
    dy, n, m = np.asarray(p.dy, np.float64), p.normalized, p.count
    total, along = dy.sum(p.batch), (dy * n).sum(p.batch)
    w, outer = p.weights, p.scale / p.std
    right = dy - w * (total + n * along) / m
    yield "dx", "the statistics are treated as constants in the gradient", outer * dy
    name = "the mean of dy is not subtracted in the gradient"
    yield "dx", name, outer * (dy - w * n * along / m)
    name = "the variance is treated as a constant in the gradient"
    yield "dx", name, outer * (dy - w * total / m)
    bare, bare_n = p.scale / np.sqrt(p.var), (p.x - p.mean) / np.sqrt(p.var)
    bare_along = (dy * bare_n).sum(p.batch)
    name = f"{EPSILON_MISSING} in the gradient"
    yield "dx", name, bare * right
    yield "dx", name, bare * (dy - w * (total + bare_n * bare_along) / m)
    yield "dx", name, outer * (dy - w * (total + bare_n * bare_along) / m)
    yield "dscale", name, bare_along
    name = f"{EPSILON_OUTSIDE}, in the gradient"
    yield "dx", name, p.scale / (np.sqrt(p.var) + p.epsilon) * right
    yield (
        "dx",
        "sums over the batch are not divided by its size",
        outer * (dy - w * (total + n * along)),
    )
    yield "dx", "the gradient of x lacks the factor scale", right / p.std
    yield "dx", "the gradient of x lacks the factor 1/√(σ² + ε)", p.scale * right
    less = np.maximum(m - 1, 1)
    name = "the gradient divides by m - 1"
    yield "dx", name, outer * (dy - w * (total + n * along) / less)
    yield "dx", name, outer * (dy - w * (total / m + n * along / less))
    yield "dx", "the gradient is divided by the batch's size", outer * right / m
    yield "dscale", "Σ dy·x instead of Σ dy·x̂", (dy * p.x).sum(p.batch)
    yield "dscale", "Σ dy·(x - μ) instead of Σ dy·x̂", (dy * (p.x - p.mean)).sum(p.batch)
    yield "dscale", "Σ dy·y instead of Σ dy·x̂", (dy * p.y(n)).sum(p.batch)
    yield "dscale", "the gradients of scale and bias are swapped", total
    yield "dbias", "the gradients of scale and bias are swapped", along
    for quantity, value in (("dscale", along), ("dbias", total)):
        yield quantity, "the mean over the batch instead of the sum", value / p.full
        yield quantity, "the mean over the batch instead of the sum", value / m
    if p.mask is not None:
        yield "dx", FULL_COUNT, outer * (dy - w * (total + n * along) / p.full)
        yield "dx", MASK_IGNORED, outer * (dy - (total + n * along) / m)


def inference(vector: Vector) -> Findings:
    """Bugs of y by given statistics."""
    p = Parts(vector)
    mean, var = vector.inputs["mean"], vector.inputs["var"]
    centered = p.x - mean
    yield "y", EPSILON_OUTSIDE, p.y(centered / (np.sqrt(var) + p.epsilon))
    yield "y", EPSILON_MISSING, p.y(centered / np.sqrt(var))
    yield "y", BY_VARIANCE, p.y(centered / (var + p.epsilon))
    yield "y", BY_VARIANCE, p.y(centered / var)
    yield "y", "normalizes by the batch at evaluation", p.y(p.normalized)


def running(vector: Vector) -> Findings:
    """Bugs of running averages."""
    given = vector.inputs
    batches, masks = [np.asarray(x) for x in given["batches"]], given.get("masks")
    for name, average in conventions.mistaken(batches, given["decay"], masks).items():
        yield "mean", name, average[0]
        yield "var", name, average[1]


def sharded(vector: Vector) -> Findings:
    """Bugs of statistics over shards."""
    given = vector.inputs
    x = np.asarray(given["x"], np.float64)
    mask = given.get("mask")
    weights = np.ones(x.shape[:2]) if mask is None else np.asarray(mask, np.float64)
    counts = weights.sum(1)[:, None]
    mean = (weights[..., None] * x).sum(1) / counts
    var = (weights[..., None] * (x - mean[:, None]) ** 2).sum(1) / counts
    square = var + mean**2
    pooled = vector.expected["mean"][0]
    groups: Sequence[Any] = given["groups"] if "groups" in given else [range(len(x))]

    def over(values: np.ndarray) -> np.ndarray:
        result = np.zeros_like(values)
        for group in groups:
            members = [int(g) for g in group]
            result[members] = values[members].mean(0)
        return result

    alone = "shards are not synchronized"
    unweighted = "averages the shards' means, without their counts"
    lost = "averages the shards' variances, without the spread of their means"
    cases = {
        alone: (mean, var),
        unweighted: (over(mean), over(square) - over(mean) ** 2),
        lost: (over(mean), over(var)),
        "the groups are ignored": (
            mean * 0 + mean.mean(0),
            var * 0 + square.mean(0) - mean.mean(0) ** 2,
        ),
    }
    if mask is not None:
        weighted = (counts * var).sum(0) / counts.sum()
        cases[f"{lost} "] = (np.zeros_like(mean) + pooled, np.zeros_like(var) + weighted)
    for name, (mean, var) in cases.items():
        yield "mean", name.strip(), mean
        yield "var", name.strip(), var
        std = np.sqrt(var[:, None] + given["epsilon"])
        yield "y", name.strip(), given["scale"] * (x - mean[:, None]) / std + given["bias"]


def renorm(vector: Vector) -> Findings:
    """Bugs of Batch Renormalization."""
    p, given = Parts(vector), vector.inputs
    r_max, d_max = given["r_max"], given["d_max"]
    running = np.sqrt(given["var"] + p.epsilon)
    r, d = p.std / running, (p.mean - given["mean"]) / running
    r_clipped, d_clipped = np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max)
    n = p.normalized
    yield "y", "the clip of r and d is thrown away", p.y(n * r + d)
    yield "y", "the clip of r is thrown away", p.y(n * r + d_clipped)
    yield "y", "the clip of d is thrown away", p.y(n * r_clipped + d)
    yield "y", "r has no lower limit 1/r_max", p.y(n * np.minimum(r, r_max) + d_clipped)
    yield "y", "r and d are not applied", p.y(n)
    yield "y", "d is not applied", p.y(n * r_clipped)
    inverted = np.clip(1 / r, 1 / r_max, r_max)
    yield "y", "r is inverted, σ/σ_B", p.y(n * inverted + d_clipped)
    wrong = np.clip((p.mean - given["mean"]) / p.std, -d_max, d_max)
    yield "y", "d is divided by the batch's σ", p.y(n * r_clipped + wrong)
    bare = np.sqrt(p.var / given["var"]).clip(1 / r_max, r_max)
    shift = ((p.mean - given["mean"]) / np.sqrt(given["var"])).clip(-d_max, d_max)
    yield "y", f"{EPSILON_MISSING} in r and d", p.y(n * bare + shift)
    yield "y", "the correction comes after scale and bias", p.y(n) * r_clipped + d_clipped
