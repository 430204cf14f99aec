"""Which statistics do I get? The README's table, a test per cell.

Eight shards of four rows, each about a mean of its own. A cell says by how many rows at a time y is
normalized, and of how many rows each state remembers the statistics.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bn_jax as bn
from tests.devices import make_mesh, pmap

SHARDS, ROWS, GROUP = 8, 4, 2
ALL = SHARDS * ROWS
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((SHARDS, ROWS, 3)) + np.arange(SHARDS)[:, None, None]
X = X.reshape(ALL, 3).astype(np.float32)
train = partial(bn.batch_norm, train=True, average=bn.Ema(0), unbiased=False)


def under_jit(kind, options):
    mesh = make_mesh((SHARDS,), ("d",), axis_types=(kind,))
    params, state = bn.init(3)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        y, new = jax.jit(lambda x: train(x, params, state, **options))(x)
        assert new.mean.sharding.is_fully_replicated
    return y, jax.tree.map(lambda part: part[None], new)


def under_shard_map(kind, options):
    """States come stacked, one per device; as replicated where all devices have the same."""
    mesh = make_mesh((SHARDS,), ("d",), axis_types=(kind,))
    pooled = "axis_name" in options

    def member(x):
        y, new = train(x, *bn.init(3), **options)
        return y, new if pooled else jax.tree.map(lambda part: part[None], new)

    with jax.set_mesh(mesh):
        out_specs = (P("d"), P() if pooled else P("d"))
        run = jax.shard_map(member, mesh=mesh, in_specs=P("d"), out_specs=out_specs)
        y, new = jax.jit(run)(jax.device_put(X, NamedSharding(mesh, P("d"))))
    return y, jax.tree.map(lambda part: part[None], new) if pooled else new


def under_map(transform, options):
    run = transform(lambda x: train(x, *bn.init(3), **options), axis_name="d")
    y, new = run(X.reshape(SHARDS, ROWS, 3))
    return y.reshape(X.shape), new


LAYOUTS = {
    "jit, Auto": partial(under_jit, AxisType.Auto),
    "jit, Explicit": partial(under_jit, AxisType.Explicit),
    "shard_map, Auto": partial(under_shard_map, AxisType.Auto),
    "shard_map, Explicit": partial(under_shard_map, AxisType.Explicit),
    "pmap": partial(under_map, pmap),
    "vmap": partial(under_map, lambda f, **kw: jax.jit(jax.vmap(f, **kw))),
}
GLOBAL, LOCAL = list(LAYOUTS)[:2], list(LAYOUTS)[2:]
CELLS = [
    *((layout, {}, ALL, ALL) for layout in GLOBAL),
    *((layout, {"group_size": GROUP}, GROUP, ALL) for layout in GLOBAL),
    *((layout, {}, ROWS, ROWS) for layout in LOCAL),
    *((layout, {"axis_name": "d"}, ALL, ALL) for layout in LOCAL),
    *((layout, {"group_size": GROUP}, GROUP, ROWS) for layout in LOCAL),
    *((layout, {"axis_name": "d", "group_size": GROUP}, GROUP, ALL) for layout in LOCAL),
]


@pytest.mark.parametrize(
    ("layout", "options", "at_a_time", "remembered"),
    [pytest.param(*cell, id=f"{cell[0]}: {' and '.join(cell[1]) or 'neither'}") for cell in CELLS],
)
def test_which(layout, options, at_a_time, remembered):
    y, state = LAYOUTS[layout](options)
    parts = X.astype(np.float64).reshape(-1, at_a_time, 3)
    expected = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected.reshape(X.shape), atol=1e-4)
    blocks = X.astype(np.float64).reshape(-1, remembered, 3)
    means, variances = np.asarray(state.mean), np.asarray(state.var)
    for mean, var in zip(means, variances, strict=True):
        assert np.abs(mean - blocks.mean(1)).max(-1).min() < 1e-5
        assert np.abs(var - blocks.var(1)).max(-1).min() < 1e-4
    assert len(np.unique(means[:, 0])) == len(blocks)


@pytest.mark.parametrize("layout", GLOBAL)
def test_under_jit_there_is_nothing_to_name(layout):
    with pytest.raises(NameError, match="axis_name='d' is not bound here"):
        LAYOUTS[layout]({"axis_name": "d"})


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_jax_refuses_a_state_of_one_device_as_replicated(kind):
    """What becomes of a forgotten axis_name under shard_map."""
    mesh = make_mesh((SHARDS,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            lambda x: train(x, *bn.init(3)), mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P())
        )
        with pytest.raises(ValueError, match="replicat"):
            jax.jit(run)(jax.device_put(X, NamedSharding(mesh, P("d"))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_inference_is_in_operations_that_converters_know(dtype):
    """ONNX and others have rules for JAX's own primitives alone."""
    params, state = bn.init(3)
    run = partial(bn.batch_norm, params=params, state=state, train=False)
    text = str(jax.make_jaxpr(run)(jnp.ones((4, 3), dtype)))
    assert "rsqrt" in text
    for ours in ("polynomial", "inverse_std", "downcast", "rounded", "divide", "power_sums"):
        assert ours not in text
