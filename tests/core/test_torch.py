"""torch's BatchNorm1d, whose momentum is 1 - decay, as recorded and, where installed, live."""

import json

import jax
import numpy as np
import pytest

import bn_jax as bn
from tests.core.golden import make_torch

RECORDED = json.loads(make_torch.GOLDEN.read_text())


def assert_agrees(run):
    run = {name: value if name == "momentum" else np.array(value) for name, value in run.items()}
    momentum = run["momentum"]
    average = bn.CumulativeAverage() if momentum is None else bn.Ema(1 - momentum)
    params = bn.BatchNormParams(jax.numpy.asarray(run["scale"]), jax.numpy.asarray(run["bias"]))
    _, state = bn.init(params.scale.size, dtype=np.float64)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)  # noqa: E731
    for step, x in enumerate(run["xs"]):
        forward = lambda x, params, state=state: bn.batch_norm(  # noqa: E731
            x, params, state, train=True, average=average
        )
        y, pullback, state = jax.vjp(forward, x, params, has_aux=True)
        close(state.mean, run["running_mean"][step])
        close(state.var, run["running_var"][step])
    dx, (dscale, dbias) = pullback(jax.numpy.asarray(run["dy"]))
    close(y, run["y"])
    close(dx, run["dx"])
    close(dscale, run["dscale"])
    close(dbias, run["dbias"])
    close(bn.batch_norm(run["xs"][0], params, state, train=False)[0], run["evaluated"])


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: f"momentum={run['momentum']}")
def test_torch_as_recorded(x64, run):
    assert_agrees(run)


@pytest.mark.peer
def test_torch_as_installed(x64):
    pytest.importorskip("torch")
    for run in make_torch.all_runs():
        assert_agrees(run)
