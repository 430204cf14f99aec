"""However a batch is laid out, its statistics are those of the examples that were named.

One batch, as a whole or in ghost groups, with four kinds of padding, filled in three ways, on 1, 2
and 8 devices in four layouts: y, the state and all gradients keep the accuracy bars against one
float64 oracle, which knows nothing of devices. A large part runs with `-m slow`.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bn_jax as bn
from bn_jax.conform import oracle
from bn_jax.conform.bars import errors, nominal_bars, normal
from tests.devices import make_mesh, pmap

ROWS, SHARDS, OFFSET = 128, 8, 1e4
GROUP = ROWS // SHARDS
X, DY = normal(ROWS, 5, OFFSET)
PARAMS, STATE = bn.init(5)
remember_all = functools.partial(bn.batch_norm, train=True, average=bn.Ema(0), unbiased=False)


def fill(name):
    """Which rows count: all; fewer in each further shard; all but those of one shard."""
    shard, place = np.divmod(np.arange(ROWS), GROUP)
    return {"even": shard >= 0, "uneven": place < GROUP - shard, "empty": shard != 3}[name]


def padded(kind, filled):
    """X and its `where`, by how it is told which rows count."""
    rows = fill(filled)
    if kind == "none":
        return X, None
    if kind == "weights":
        return X, np.where(rows, np.random.default_rng(5).uniform(0.5, 2, ROWS), 0).astype("f4")
    return (np.where(rows[:, None], X, np.nan) if kind == "nan" else X), rows


def pulled_back(forward, x, where, dy):
    """What a training step computes of (x, where): y, dx, dγ, dβ and the state."""
    y, pull, state = jax.vjp(
        lambda x, params: forward(x, params, STATE, where=where), x, PARAMS, has_aux=True
    )
    dx, dparams = pull(dy)
    return y, dx, *dparams, state


def jitted(devices, group_size):
    """A batch sharded over devices, under plain jit: there is nothing to name."""
    mesh = make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    forward = functools.partial(remember_all, group_size=group_size)
    step = jax.jit(functools.partial(pulled_back, forward))
    return lambda *args: step(*jax.device_put(args, NamedSharding(mesh, P("d"))))


def member(group_size, *args):
    """One member's share; gradients of what all share are sums over the members."""
    forward = functools.partial(remember_all, group_size=group_size, axis_name="d")
    y, dx, dscale, dbias, state = pulled_back(forward, *args)
    return y, dx, jax.lax.psum(dscale, "d"), jax.lax.psum(dbias, "d"), state


def shard_mapped(devices, group_size):
    mesh = make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))

    def step(x, where, dy):
        forward = functools.partial(remember_all, group_size=group_size, axis_name="d")
        return pulled_back(forward, x, where, dy)

    def run(*args):
        specs = jax.tree.map(lambda _: P("d"), args)
        out_specs = (P("d"), P("d"), P(), P(), P())
        args = jax.device_put(args, NamedSharding(mesh, P("d")))
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out_specs))(*args)

    return run


def mapped(transform, devices, group_size):
    """By vmap or pmap over a leading axis of members."""
    step = transform(functools.partial(member, group_size), axis_name="d")

    def run(*args):
        args = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), args)
        y, dx, *shared = step(*args)
        first = jax.tree.map(lambda part: part[0], shared)
        return y.reshape(X.shape), dx.reshape(X.shape), *first

    return run


LAYOUTS = {
    "jit": jitted,
    "shard_map": shard_mapped,
    "pmap": functools.partial(mapped, pmap),
    "vmap": functools.partial(mapped, lambda f, **kw: jax.jit(jax.vmap(f, **kw))),
}
PADDINGS = [
    (kind, filled)
    for kind in ("none", "mask", "weights", "nan")
    for filled in ("even", "uneven", "empty")
    if kind != "none" or filled == "even"
]
EVERY = list(itertools.product(LAYOUTS, (1, 2, 8), (None, GROUP), PADDINGS))
QUICK = [
    case for case in EVERY if case[1] == 8 and case[3] in (("weights", "uneven"), ("nan", "empty"))
]


def parameters(cases, **options):
    for layout, devices, group_size, (kind, filled) in cases:
        name = f"{layout}-{devices}-{'ghost' if group_size else 'whole'}-{kind}-{filled}"
        yield pytest.param(layout, devices, group_size, kind, filled, id=name, **options)


@pytest.mark.parametrize(
    ("layout", "devices", "group_size", "kind", "filled"),
    [
        *parameters(QUICK),
        *parameters([case for case in EVERY if case not in QUICK], marks=pytest.mark.slow),
    ],
)
def test_layouts(layout, devices, group_size, kind, filled):
    x, where = padded(kind, filled)
    y, dx, dscale, dbias, state = LAYOUTS[layout](devices, group_size)(x, where, DY)
    outcome = oracle.Outcome(y, dx, dscale, dbias, state.mean, state.var)
    outcome = oracle.Outcome(*(np.asarray(part, np.float64) for part in outcome))
    for quantity, error in worst_errors(outcome, x, where, group_size or ROWS).items():
        assert error <= nominal_bars(OFFSET)[quantity], quantity


def worst_errors(outcome, x, where, group_size):
    """Each group against its own oracle; sums over groups and the state against the whole's."""
    parts = [slice(first, first + group_size) for first in range(0, ROWS, group_size)]
    truths = [
        oracle.step(x[rows], DY[rows], weights=None if where is None else where[rows])
        for rows in parts
    ]
    sums = {name: sum(getattr(truth, name) for truth, _ in truths) for name in ("dscale", "dbias")}
    whole, known = oracle.step(x, DY, weights=where)
    normalized = np.concatenate([known.normalized for _, known in truths])
    found = errors(
        outcome, whole._replace(**sums), known._replace(normalized=normalized), DY, OFFSET
    )
    for rows, (truth, known) in zip(parts, truths, strict=True):
        each = truth._replace(y=outcome.y[rows], dx=outcome.dx[rows])
        error = errors(each, truth, known, DY[rows], OFFSET)
        group = {name: error[name] for name in ("y", "dx")}
        if rows.start == 0:
            found.update(group)
        found.update({name: max(found[name], group[name]) for name in group})
    return found
