"""The vectors of evaluation, running averages, shards, renormalization, and a batch of one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bn_jax.conform import bars, conventions, oracle
from bn_jax.conform.vectors import HALF, Vector, rounded


def other(
    name: str,
    group: str,
    call: str,
    inputs: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    check: str = "close",
    dtype: str = "float32",
) -> Vector:
    """A vector of one of the other functions, with a few roundings allowed."""
    rounding = HALF.get(dtype, 0) if call == "infer" else 0
    tolerance = {
        q: 1e-5 + rounding * np.nanmax(np.abs(v)) for q, v in expected.items() if check == "close"
    }
    return Vector(name, group, (call,), dtype, check, dict(inputs), dict(expected), tolerance, {})


def one_value() -> Vector:
    """A batch of one: y is β, if it is not refused."""
    x = bars.normal(1, 3, 2.0)[0]
    bias = np.array([1.0, 2.0, 3.0])
    inputs = {"x": x, "scale": np.ones(3), "bias": bias, "epsilon": 1e-5}
    expected = {"y": bias[None], "mean": x[0], "var": np.zeros(3)}
    return other("1×3", "one value", "batch_norm", inputs, expected, check="refusal")


def evaluation() -> list[Vector]:
    """Y by given statistics, in float32 and in bfloat16."""
    mean, var = np.array([100.3, -50.7, 3.1, 0.2]), np.array([1.003, 4.1, 0.25, 9])
    mean, var = rounded(mean, "float32"), rounded(var, "float32")
    noise = bars.normal(8, 4, seed=1)[0]
    given = {"scale": [0.5, 2, -1, 1.5], "bias": [1, -2, 0.5, 0], "epsilon": 0.25}
    found = []
    for dtype in ("float32", "bfloat16"):
        x = rounded(noise * np.sqrt(var) + mean, dtype)
        y = (oracle.wide(x) - mean) / np.sqrt(oracle.wide(var) + given["epsilon"])
        y = y * np.asarray(given["scale"]) + np.asarray(given["bias"])
        inputs = {"x": x, **given, "mean": mean, "var": var}
        found.append(other(dtype, "evaluation", "infer", inputs, {"y": y}, dtype=dtype))
    return found


def running_averages() -> list[Vector]:
    """Three batches of four values, where m/(m - 1) is 4/3."""
    batches = [bars.normal(4, 3, 3.0, seed)[0] * (seed + 1) for seed in (1, 2, 3)]
    masks = [np.array(m) for m in ([1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0])]
    masks = [m.astype(bool) for m in masks]
    half = [rounded(x + 100, "bfloat16") for x in batches]
    cases = (("3 batches", batches, "float32"), ("bfloat16", half, "bfloat16"))
    found = [
        other(
            name,
            "running average",
            "running",
            {"batches": x, "decay": 0.9},
            named(conventions.accepted(x, 0.9)),
            check="convention",
            dtype=dtype,
        )
        for name, x, dtype in cases
    ]
    masked = {"batches": batches, "decay": 0.9, "masks": masks}
    expected = named(conventions.accepted(batches, 0.9, masks))
    return [
        *found,
        other("masks", "running average", "running", masked, expected, check="convention"),
    ]


def named(averages: Mapping[str, conventions.Average]) -> dict[str, dict[str, np.ndarray]]:
    """Averages as results with names."""
    return {name: {"mean": mean, "var": var} for name, (mean, var) in averages.items()}


def bad_batches() -> list[Vector]:
    """One bad batch between two good ones; what is remembered is to stay finite."""
    good = bars.normal(4, 3, seed=1)[0]
    bad = good.copy()
    bad[1, 1] = np.nan
    all_in, none = np.ones(4, bool), np.zeros(4, bool)
    inputs = {"batches": [good, bad, good], "decay": 0.9}
    empty = {"batches": [good, good[:0], good], "decay": 0.9}
    masked = {"batches": [good, good, good], "decay": 0.9, "masks": [all_in, none, all_in]}
    cases = {"a batch that holds a NaN": inputs, "an empty batch": empty}
    cases["a batch that is all masked out"] = masked
    return [
        other(name, "bad batches", "running", case, {}, check="finite")
        for name, case in cases.items()
    ]


def shards() -> list[Vector]:
    """One batch in shards of uneven counts, one of them empty, and in two groups of shards."""
    x = (
        bars.normal(32, 3, seed=1)[0].reshape(4, 8, 3)
        + np.arange(4, dtype=np.float32)[:, None, None]
    )
    mask = np.arange(8) < np.array([[8], [1], [3], [0]])
    given = {"scale": [0.5, 2, -1], "bias": [1, -2, 0.5], "epsilon": 0.25}
    cases: dict[str, dict[str, Any]] = {
        "even": {"x": x},
        "uneven counts": {"x": x[:3], "mask": mask[:3]},
        "an empty shard": {"x": x, "mask": mask},
        "two groups": {"x": x, "groups": [[0, 1], [2, 3]]},
    }
    found = []
    for name, case in cases.items():
        expected = synchronized(case["x"], case.get("mask"), case.get("groups"), **given)
        order = {"x": case["x"], **given, **case}
        found.append(other(name, "shards", "sharded", order, expected))
    return found


def synchronized(
    x: np.ndarray, mask: Any, groups: Any, scale: Any, bias: Any, epsilon: float
) -> dict[str, np.ndarray]:
    """Batch norm of shards as of one batch; statistics per shard, which agree within a group."""
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    y, mean, var = np.zeros(x.shape), np.zeros((len(x), 3)), np.zeros((len(x), 3))
    for group in groups or [range(len(x))]:
        group = list(group)
        f = oracle.forward(x[group], scale, bias, epsilon=epsilon, weights=mask[group])
        y[group], mean[group], var[group] = f.y, f.mean, f.var
    return {"y": np.where(mask[..., None], y, np.nan), "mean": mean, "var": var}


def renorms() -> list[Vector]:
    """R and d are clipped in some features: both, either, neither."""
    x = bars.normal(8, 4, 1.0, seed=1)[0]
    mean, var = np.array([5.0, 1.0, 5.0, 1.25]), np.array([0.0625, 0.0625, 1.0, 9.0])
    given = {"scale": [0.5, 2, -1, 1.5], "bias": [1, -2, 0.5, 0], "epsilon": 0.25}
    limits = {"mean": mean, "var": var, "r_max": 1.5, "d_max": 0.5}
    f = oracle.forward(x, epsilon=given["epsilon"])
    std, running = 1 / f.inverse_std, np.sqrt(var + given["epsilon"])
    r = np.clip(std / running, 1 / limits["r_max"], limits["r_max"])
    d = np.clip((f.mean - mean) / running, -limits["d_max"], limits["d_max"])
    y = np.asarray(given["scale"]) * (f.normalized * r + d) + np.asarray(given["bias"])
    return [other("8×4", "renorm", "renorm", {"x": x, **given, **limits}, {"y": y})]
