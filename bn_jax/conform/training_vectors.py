"""The vectors of a training step: y, the batch's statistics, and the gradients."""

from typing import Any

import numpy as np

from bn_jax.conform import bars, oracle
from bn_jax.conform.vectors import HALF, Vector, rounded

OFFSETS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5)


def training(
    name: str,
    group: str,
    x: np.ndarray,
    dy: np.ndarray,
    *,
    scale: Any = None,
    bias: Any = None,
    epsilon: float = 1e-5,
    mask: np.ndarray | None = None,
    offset: float = 0.0,
    dtype: str = "float32",
    loose: float = 1.0,
) -> Vector:
    """A vector of a training step: y, the batch's statistics, and the gradients.

    `loose` multiplies the bars where it is the formula that is asked, not its last digits.
    """
    features = x.shape[-1]
    scale = np.ones(features) if scale is None else np.asarray(scale)
    bias = np.zeros(features) if bias is None else np.asarray(bias)
    f = oracle.forward(x, scale, bias, epsilon=epsilon, weights=mask)
    dx, dscale, dbias = oracle.backward(x, dy, scale, epsilon=epsilon, weights=mask)
    y = f.y if mask is None else np.where(mask[:, None], f.y, np.nan)
    flat, dflat = x.reshape(-1, features), dy.reshape(-1, features)
    sizes = bars.sizes(*oracle.step(flat, dflat, epsilon=epsilon, weights=mask), dflat, offset)
    gain = {"y": np.maximum(1, np.abs(scale) + np.abs(bias)), "dx": np.abs(scale)}
    rounding = {q: HALF.get(dtype, 0) * np.nanmax(np.abs(v)) for q, v in (("y", y), ("dx", dx))}
    floor = {"var": epsilon * 1e-6, "dscale": 2e-6 * np.abs(dflat).sum(0)}
    tolerance, lenient = (
        {
            q: np.maximum(loose * bar * sizes[q] * gain.get(q, 1), floor.get(q, 0))
            + rounding.get(q, 0)
            for q, bar in allowed(offset).items()
        }
        for allowed in (bars.nominal_bars, bars.two_pass_bars)
    )
    tolerance["y"], lenient["y"] = tolerance["y"].min(0), lenient["y"].min(0)
    inputs = {"x": x, "scale": scale, "bias": bias, "epsilon": epsilon, "dy": dy}
    if mask is not None:
        inputs["mask"] = mask
    expected = {"y": y, "mean": f.mean, "var": f.var, "dx": dx, "dscale": dscale, "dbias": dbias}
    calls = ("batch_norm", "gradient")
    return Vector(
        name, group, calls, dtype, "close", inputs, expected, tolerance, lenient if offset else {}
    )


def large_means() -> list[Vector]:
    """The vectors of `bn-jax bench --suite accuracy`, on fewer values."""
    return [
        training(f"mean {R:g}", "large mean", *bars.normal(32, 4, R), offset=R) for R in OFFSETS
    ]


def formulas() -> list[Vector]:
    """Few values, a large ε, and as many examples as features: each mistake shows."""
    affine: dict[str, Any] = {"scale": [0.5, 2, -1, 1.5, 3, 0.25], "bias": [1, -2, 0.5, 0, 3, -1]}
    x, dy = bars.normal(6, 6, 2.0, seed=1)
    pixels, dpixels = (a.reshape(2, 3, 3, 4) for a in bars.normal(18, 4, 1.0, seed=1))
    steps = np.arange(18, dtype=np.float32).reshape(2, 3, 3, 1)
    return [
        training("6×6", "formula", x, dy, epsilon=0.25, loose=10, **affine),
        training(
            "images",
            "images",
            pixels + steps / 4,
            dpixels,
            epsilon=0.25,
            loose=10,
            scale=affine["scale"][:4],
            bias=affine["bias"][:4],
        ),
    ]


def constant_features() -> Vector:
    """Features whose values are all the same: y is β, and nothing is divided by zero.

    A mean rounded to float32 is off by up to 16 u of the constant. By that, in standard deviations
    of √ε, y is moved.
    """
    x = np.tile(np.array([0, 0.1, 1000.1], np.float32), (7, 1))
    dy = bars.normal(7, 3)[1]
    vector = training("7×3", "constant feature", x, dy, bias=[1.0, 2.0, 3.0])
    moved = 16 * oracle.U * x[0].astype(float)
    lenient = {name: value.copy() for name, value in vector.tolerance.items()}
    lenient["mean"] += moved
    lenient["var"] += moved**2
    lenient["y"] += moved / np.sqrt(1e-5)
    lenient["dscale"] += moved / np.sqrt(1e-5) * np.abs(dy).sum(0)
    lenient["dx"] += (moved**2 + moved) / 1e-5 * np.abs(vector.expected["dx"]).max(0)
    return vector._replace(lenient=lenient)


def masks() -> list[Vector]:
    """Eight of twelve examples count; the others hold numbers, then NaN and infinities."""
    x, dy = bars.normal(12, 4, 3.0, seed=1)
    mask = np.arange(12) % 5 < 3
    x, dy = np.where(mask[:, None], x, 40).astype(np.float32), dy * mask[:, None]
    bad = np.array([np.nan, np.inf, -np.inf, np.nan], np.float32)
    affine: dict[str, Any] = {"scale": [0.5, 2, -1, 1.5], "bias": [1, -2, 0.5, 0]}
    affine |= {"epsilon": 0.25, "loose": 10}
    padded = np.where(mask[:, None], x, bad)
    return [
        training("8 of 12", "mask", x, dy, mask=mask, **affine),
        training("8 of 12", "padding holds NaN", padded, dy, mask=mask, **affine),
    ]


def half_precision() -> list[Vector]:
    """Means and squares that half precision cannot hold."""
    cases = (("bfloat16", 100.0, 1.0), ("float16", 100.0, 1.0), ("float16", 0.0, 300.0))
    found = []
    for dtype, offset, std in cases:
        x, dy = bars.normal(32, 4)
        x, dy = rounded(x * std + offset, dtype), rounded(dy, dtype)
        name = f"{dtype}, mean {offset:g}, std {std:g}"
        found.append(training(name, "half precision", x, dy, offset=offset / std, dtype=dtype))
    return found
