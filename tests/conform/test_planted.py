"""Each planted bug is found and called by its name, and right batch norms pass."""

import inspect
import types
from pathlib import Path

import numpy as np
import pytest

from bn_jax.conform import example, judge, report
from bn_jax.conform.find import examine
from tests.conform import plain

# what is replaced, by what, and what of the name must be said
PLAIN = {
    "cancelling variance": (
        "np.square(x - mean).mean(axes)",
        "(x**2).mean(axes, dtype=np.float32) - x.mean(axes, dtype=np.float32) ** 2",
        "cancelling variance",
    ),
    "unbiased": (
        "np.square(x - mean).mean(axes)",
        "np.square(x - mean).sum(axes) / (x.size / x.shape[-1] - 1)",
        "normalizes by the unbiased variance; the unbiased variance is returned",
    ),
    "ε outside": (
        "np.sqrt(var + epsilon) + bias\n    return y",
        "(np.sqrt(var) + epsilon) + bias\n    return y",
        "ε is outside of the root",
    ),
    "ε missing": (
        "np.sqrt(var + epsilon) + bias\n    return y",
        "np.sqrt(var) + bias\n    return y",
        "ε is missing",
    ),
    "by the variance": (
        "np.sqrt(var + epsilon) + bias\n    return y",
        "(var + epsilon) + bias\n    return y",
        "divides by the variance",
    ),
    "mean kept": ("scale * (x - mean) / np", "scale * x / np", "the mean is not subtracted"),
    "1 + scale": ("scale * (x - mean) / np", "(1 + scale) * (x - mean) / np", "1 + scale"),
    "swapped": (
        "y = scale * (x - mean) / np.sqrt(var + epsilon) + bias",
        "y = bias * (x - mean) / np.sqrt(var + epsilon) + scale",
        "scale and bias are swapped",
    ),
    "variance with ε": ("return y, mean, var", "return y, mean, var + epsilon", "with ε added"),
    "std": (
        "return y, mean, var",
        "return y, mean, np.sqrt(var)",
        "standard deviation is returned",
    ),
    "first axis only": (
        "    axes = tuple(range(x.ndim - 1))\n    mean",
        "    axes = (0,)\n    mean",
        "mean of shape (3, 3, 4), not (4,)",
    ),
    "constants": (
        "(dy - dbias / m - normalized * dscale / m)",
        "dy",
        "the statistics are treated as constants in the gradient",
    ),
    "mean of dy": ("dy - dbias / m -", "dy -", "the mean of dy is not subtracted"),
    "constant variance": (
        " - normalized * dscale / m",
        "",
        "the variance is treated as a constant",
    ),
    "ε missing in the gradient": (
        "std = np.sqrt(var + epsilon)",
        "std = np.sqrt(var)",
        "ε is missing in the gradient",
    ),
    "m - 1": ("dscale / m)", "dscale / (m - 1))", "the gradient divides by m - 1"),
    "no scale": ("dx = scale / std", "dx = 1 / std", "lacks the factor scale"),
    "sums": ("dbias / m - normalized * dscale / m", "dbias - normalized * dscale", "not divided"),
    "mean of gradients": (
        "return dx, dscale, dbias",
        "return dx, dscale / m, dbias / m",
        "the mean over the batch instead of the sum",
    ),
    "dy·x": ("(dy * normalized).sum", "(dy * x).sum", "Σ dy·x instead of Σ dy·x̂"),
    "ε outside at evaluation": (
        "np.sqrt(var + epsilon) + bias\n\n\ndef running",
        "(np.sqrt(var) + epsilon) + bias\n\n\ndef running",
        "ε is outside of the root",
    ),
    "seed text": (
        "np.sqrt(var + epsilon) + bias\n\n\ndef running",
        "var + bias\n\n\ndef running",
        "divides by the variance",
    ),
    "rounded statistics": (
        "(x - mean.astype(np.float64)) / np.sqrt(var",
        "(x - mean.astype(x.dtype)) / np.sqrt(var.astype(x.dtype)",
        "half precision",
    ),
    "batch at evaluation": (
        "return scale * (x - mean.astype(np.float64))",
        "mean, var = x.mean(0), x.var(0)\n    return scale * (x - mean.astype(np.float64))",
        "normalizes by the batch at evaluation",
    ),
    "inverted": (
        "mean, var = 0.0, 1.0",
        "mean, var, decay = 0.0, 1.0, 1 - decay",
        "momentum inverted",
    ),
    "variance from zero": (
        "mean, var = 0.0, 1.0",
        "mean, var = 0.0, 0.0",
        "the variance starts at 0",
    ),
    "last batch": (
        "mean, var = 0.0, 1.0",
        "mean, var, decay = 0.0, 1.0, 0.0",
        "keeps the last batch only",
    ),
    "biased, said to be unbiased": (
        " * len(x) / max(len(x) - 1, 1)\n    return mean, var",
        "\n    return mean, var\n\n\nunbiased = True",
        "biased, and said not to be",
    ),
    "unbiased, said to be biased": (
        "    return mean, var\n",
        "    return mean, var\n\n\nunbiased = False\n",
        "unbiased, and said not to be",
    ),
    "running average in half": (
        "        mean = decay * mean + (1 - decay) * new_mean\n",
        "        mean = (decay * mean + (1 - decay) * new_mean).astype(x.dtype)\n",
        "half precision",
    ),
    "in place": (
        "    mean = x.mean(axes",
        "    x[...] = x * 1.5\n    mean = x.mean(axes",
        "in place",
    ),
}
FULL = {
    "full count": (
        "(weights * x).sum(axes) / np.maximum(count, 1)",
        "(weights * x).sum(axes) / (x.size / x.shape[-1])",
        "masked sums are divided by the full count",
    ),
    "full count in the variance": (
        "** 2).sum(axes) / np.maximum(count, 1)",
        "** 2).sum(axes) / (x.size / x.shape[-1])",
        "full count, in the variance",
    ),
    "mask ignored": ("if mask is None else mask.astype(float)", "", "the mask is ignored"),
    "leak": (
        "np.where(weights > 0, x.astype(float), 0)",
        "x.astype(float)",
        "the padding leaks",
    ),
    "gradient's full count": (
        "(dbias + normalized * dscale) / count)",
        "(dbias + normalized * dscale) / len(x))",
        "masked sums are divided by the full count",
    ),
    "shards alone": (
        "[list(range(len(x)))]",
        "[[member] for member in range(len(x))]",
        "shards are not synchronized",
    ),
    "groups ignored": ("in groups or [", "in [", "the groups are ignored"),
    "no clip": (
        "r = np.clip(std / running_std, 1 / r_max, r_max)",
        "r = std / running_std; np.clip(r, 1 / r_max, r_max)",
        "the clip of r is thrown away",
    ),
    "no clip of d": (
        "np.clip((batch_mean - mean) / running_std, -d_max, d_max)",
        "(batch_mean - mean) / running_std",
        "the clip of d is thrown away",
    ),
    "no lower clip": ("1 / r_max, r_max)", "0, r_max)", "no lower limit"),
    "debiased wrongly": (
        "mean = var = weight = np.zeros(batches[0].shape[-1])",
        "mean = var = weight = np.zeros(batches[0].shape[-1]); var = var + 1",
        "debiased as if from 0, but the variance starts at 1",
    ),
    "zeros for one value": ('raise ValueError("one', '0 and ValueError("one', judge.SILENT),
    "spoiled by NaN": ("np.isfinite(new_mean + new_var) & ", "", "holds a NaN spoils"),
}


def planted(module, old, new):
    """The module with one place of its source changed."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{source.count(old)} times in the source: {old}"
    changed = types.ModuleType("planted")
    exec(compile(source.replace(old, new), "planted", "exec"), changed.__dict__)
    return examine(changed)


def told(findings):
    """All that a user reads about what is wrong or worth a note."""
    bad = [v for v in report.verdicts(findings) if v.level in ("wrong", "note")]
    return "\n".join("; ".join(v.names) + " | " + "; ".join(v.details) for v in bad)


CASES = [(plain, name, *case) for name, case in PLAIN.items()]
CASES += [(example, name, *case) for name, case in FULL.items()]


@pytest.mark.parametrize(
    ("module", "old", "new", "name"),
    [pytest.param(module, *case, id=name) for module, name, *case in CASES],
)
def test_a_planted_bug_is_named(module, old, new, name):
    assert name in told(judge.try_all(planted(module, old, new)))


def test_right_ones_pass():
    """What is right to twenty lines of numpy gets notes; all that is known to be better, none."""
    findings = judge.try_all(examine(plain))
    assert not report.is_wrong(findings), told(findings)
    assert {f.level for f in judge.try_all(examine(example))} == {"right"}


def test_a_mean_rounded_to_float32_is_a_note():
    """It cannot be better, if x - mean is computed in one step of float32."""
    old = "mean = x.mean(axes, dtype=np.float64)"
    rounded = planted(plain, old, f"{old}.astype(np.float32)")
    findings = judge.try_all(rounded)
    assert not report.is_wrong(findings), told(findings)
    assert judge.ROUNDED_MEAN in told(findings)


def test_the_plain_one_has_about_twenty_lines():
    code = Path(plain.__file__).read_text().partition("import numpy as np")[2]
    assert len([line for line in code.splitlines() if line and not line.startswith("def")]) <= 22


def test_a_bug_is_named_whatever_stands_in_the_padding():
    """y is free where a mask leaves values out; here it is zero."""
    wrong = planted(example, *FULL["full count"][:2]).functions["batch_norm"]

    def batch_norm(x, scale, bias, epsilon, mask=None):
        y, mean, var = wrong(x, scale, bias, epsilon, mask)
        return y if mask is None else np.where(mask[:, None], y, 0), mean, var

    (vector,) = (v for v in judge.load() if v.group == "mask")
    finding = judge.try_one(examine(batch_norm), "batch_norm", vector)
    assert finding.detail.startswith("y is off")
    assert finding.names[0] == "masked sums are divided by the full count, in the mean"
