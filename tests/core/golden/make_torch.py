"""Write torch.json: what torch.nn.BatchNorm1d computes, in double precision.

Run by hand where torch is installed: python tests/core/golden/make_torch.py
"""

import json
from pathlib import Path

GOLDEN = Path(__file__).with_name("torch.json")
MOMENTA = [0.1, 0.01, 1.0, None]
STEPS, M, C = 4, 6, 3


def run(torch, momentum):
    """Train for a few steps, then evaluate; every number a test may want."""
    generator = torch.Generator().manual_seed(2015)
    xs = torch.randn(STEPS, M, C, generator=generator, dtype=torch.float64) * 3 + 2
    dy = torch.randn(M, C, generator=generator, dtype=torch.float64)
    norm = torch.nn.BatchNorm1d(C, eps=1e-5, momentum=momentum, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(C, generator=generator, dtype=torch.float64))
        norm.bias.copy_(torch.randn(C, generator=generator, dtype=torch.float64))
    means, variances = [], []
    for x in xs:
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(dy)
        means.append(norm.running_mean.tolist())
        variances.append(norm.running_var.tolist())
    last = {"y": y, "dx": leaf.grad, "dscale": norm.weight.grad, "dbias": norm.bias.grad}
    norm.eval()
    given = {"xs": xs, "dy": dy, "scale": norm.weight, "bias": norm.bias, "evaluated": norm(xs[0])}
    tensors = {name: value.detach().tolist() for name, value in (last | given).items()}
    return {"momentum": momentum, "running_mean": means, "running_var": variances, **tensors}


def all_runs():
    """One run for each momentum; imports torch."""
    import torch

    return [run(torch, momentum) for momentum in MOMENTA]


if __name__ == "__main__":
    GOLDEN.write_text("[\n" + ",\n".join(map(json.dumps, all_runs())) + "\n]\n")
