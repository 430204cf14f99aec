"""How accurate a batch norm in float32 can be asked to be, and how its errors are measured.

For x ~ N(R, 1) per feature, dy ~ N(0, 1), γ = 1, ε = 1e-5, in float32:

    variance, relative                              1e-6, and 1e-5 at R = 1e5
    y, absolute                                     5e-6, and 1e-5
    dx, relative to max |dx|                        2e-6, and 1e-5
    dγ, dβ, relative to Σ|dy·x̂|, Σ|dy|              2e-6
    mean, in ulp                                    2

Three of the bars cannot be met by any computation in float32 as they stand, and are adjusted:

- dx relative to max |dx|, for m = 2 and 3. dx = γr·P(dy), where P removes the components of dy
  along 1 and x̂. With m = 2, these span everything, and only what ε leaves remains:
  γ r dy ε/(σ² + ε), a difference of terms 10⁵ times as large, so 5 digits are lost. With m = 3,
  one direction is left, and dy can be arbitrarily close to orthogonal to it. So for m < 5 the
  error is taken relative to the size of the terms, γ r (|dy| + |E dy| + |x̂ E[dy·x̂]|).
- 2 ulp of a mean near zero. At best, a mean is the rounded sum of rounded deviations from an
  origin. Its error is u times their size, σ, however small the mean is. So the bar is 2 ulp of
  max(|μ|, σ), which for R ≥ 100 is an ulp of the mean itself.
- 5e-6 for large y. Beyond ten standard deviations, where a normal x never is, y is rounded
  relative to its own size, and the bar is 8 units of roundoff.
"""

import math

import numpy as np

from bn_jax.conform import oracle

QUANTITIES = ("var", "y", "dx", "dscale", "dbias", "mean")


def normal(
    m: int, features: int, offset: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """X ~ N(offset, 1) and dy ~ N(0, 1), in float32, the same at each call."""
    random = np.random.default_rng([m, features, *[seed] * (seed > 0)])
    x, dy = random.standard_normal((2, m, features))
    return (x + offset).astype(np.float32), dy.astype(np.float32)


def nominal_bars(offset: float) -> dict[str, float]:
    """The bars listed in this module's docstring, at one offset R."""
    near = offset <= 1e4
    return {
        "var": 1e-6 if near else 1e-5,
        "y": 5e-6 if near else 1e-5,
        "dx": 2e-6 if near else 1e-5,
        "dscale": 2e-6,
        "dbias": 2e-6,
        "mean": 2.0,
    }


def two_pass_bars(offset: float) -> dict[str, float]:
    """The bars for a computation that rounds the mean to float32 before it subtracts the mean.

    The mean of a few dozen values is then off by up to 16 u R, whichever way it is summed. This
    moves x̂ by as much and the variance by its square.
    """
    bars, moved = nominal_bars(offset), 16 * oracle.U * offset
    shifts = {"var": moved**2, "y": moved, "dx": moved, "dscale": moved, "dbias": 0, "mean": 8}
    return {quantity: bars[quantity] + shifts[quantity] for quantity in QUANTITIES}


def sizes(
    truth: oracle.Outcome, known: oracle.Forward, dy: np.ndarray, offset: float = 0.0
) -> dict[str, np.ndarray]:
    """What the error of each quantity is divided by before it is compared with its bar."""
    dy, std = oracle.wide(dy), np.sqrt(truth.var)
    mean_term, std_term = truth.dbias, known.normalized * truth.dscale
    along = (np.abs(mean_term) + np.abs(std_term)) / np.where(known.count > 0, known.count, 1)
    terms = (known.inverse_std * (np.abs(dy) + along)).max(0)
    return {
        "var": truth.var,
        "y": np.maximum(1, 8 * oracle.U * np.abs(truth.y) / nominal_bars(offset)["y"]),
        "dx": terms if len(dy) < 5 else np.minimum(terms, np.abs(truth.dx).max(0)),
        "dscale": np.abs(dy * known.normalized).sum(0),
        "dbias": np.abs(dy).sum(0),
        "mean": ulp(np.maximum(np.abs(truth.mean), std)),
    }


def errors(
    outcome: oracle.Outcome,
    truth: oracle.Outcome,
    known: oracle.Forward,
    dy: np.ndarray,
    offset: float,
) -> dict[str, float]:
    """The worst error of each quantity, in the unit of its bar; infinite where it is NaN."""
    tiny, result = np.finfo(float).tiny, {}
    for quantity, size in sizes(truth, known, dy, offset).items():
        error = np.abs(oracle.wide(getattr(outcome, quantity)) - getattr(truth, quantity))
        worst = float((error / np.maximum(size, tiny)).max())
        result[quantity] = math.inf if math.isnan(worst) else worst
    return result


def ulp(x: np.ndarray) -> np.ndarray:
    """The distance between neighbouring float32 numbers at x."""
    return np.spacing(np.asarray(x, np.float32)).astype(np.float64)
