"""Members of named axes: groups of them, axes within axes, and how often they talk."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bn_jax as bn
from bn_jax.bench.scaling import collectives
from tests.devices import make_mesh, pmap

ROWS, MEMBERS = 16, 8
RANDOM = np.random.default_rng(0)
X = (RANDOM.standard_normal((ROWS, 3)) * 2 + 100).astype(np.float32)
DY = RANDOM.standard_normal((ROWS, 3)).astype(np.float32)
PARAMS, STATE = bn.init(3)
train = partial(bn.batch_norm, params=PARAMS, state=STATE, train=True)
GROUPS = {
    "pairs": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "strided": [[0, 4, 2, 6], [1, 3, 5, 7]],
    "uneven": [[3], [0, 1, 2, 4, 5, 6, 7]],
    "all": [[*range(8)]],
}


def split(values):
    return values.reshape(MEMBERS, -1, *values.shape[1:])


def step(groups, x, dy):
    """Y, dx and the state of one member."""
    y, pull, state = jax.vjp(
        lambda x: train(x, axis_name="d", axis_index_groups=groups), x, has_aux=True
    )
    return y, pull(dy)[0], state


@jax.jit
def batch(x, dy):
    """The same of a whole batch."""
    y, pull, state = jax.vjp(train, x, has_aux=True)
    return y, pull(dy)[0], state


def by_map(transform, groups, x, dy):
    run = jax.jit(transform(partial(step, groups), axis_name="d"))
    y, dx, state = run(split(x), split(dy))
    return y.reshape(x.shape), dx.reshape(x.shape), state


def by_shard_map(check, groups, x, dy):
    mesh = make_mesh((MEMBERS,), ("d",), axis_types=(AxisType.Auto,))

    def member(x, dy):
        y, dx, state = step(groups, x, dy)
        return y, dx, jax.tree.map(lambda part: part[None], state)

    run = jax.shard_map(member, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check)
    return jax.jit(run)(x, dy)


EVERYWHERE = {
    "vmap": partial(by_map, jax.vmap),
    "vmap of jit": partial(by_map, lambda f, **kw: jax.vmap(jax.jit(f), **kw)),
    "pmap": partial(by_map, pmap),
    "shard_map": partial(by_shard_map, True),
    "shard_map without checks": partial(by_shard_map, False),
}


@pytest.mark.parametrize("layout", EVERYWHERE)
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_is_a_batch_of_its_own(name, layout):
    """Forward, backward and in memory; whatever the others hold."""
    x = X.copy()
    if name == "uneven":
        x[3 * 2] = np.nan  # a value of the member that is alone
    y, dx, state = EVERYWHERE[layout](GROUPS[name], x, DY)
    for group in GROUPS[name]:
        rows = np.concatenate([np.arange(ROWS).reshape(MEMBERS, -1)[member] for member in group])
        alone_y, alone_dx, alone = batch(x[rows], DY[rows])
        np.testing.assert_allclose(y[rows], alone_y, atol=5e-6)
        np.testing.assert_allclose(dx[rows], alone_dx, atol=5e-6)
        for member in group:
            mine = jax.tree.map(lambda part, member=member: part[member], state)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), mine, alone)


def test_pool_within_groups():
    def member(x):
        return bn.pool(bn.measure(x), "d", axis_index_groups=GROUPS["strided"])

    pooled = jax.vmap(member, axis_name="d")(split(X))
    for group in GROUPS["strided"]:
        whole = bn.measure(split(X)[group, ...].reshape(-1, 3))
        mine = jax.tree.map(lambda part, group=group: part[group[1]], pooled)
        # Stored means are rounded: of the variance, about σ·ulp(μ) is lost (test_monoid.py).
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), mine, whole)


@pytest.mark.parametrize(
    ("axis_name", "groups", "message"),
    [
        ("d", [[0, 1], [2, 3]], "must hold each of the 8 indices of axis 'd' once"),
        ("d", [[*range(8)], [0]], "must hold each of the 8 indices"),
        ("d", [[*range(8)], []], "must hold each of the 8 indices"),
        (("d", "e"), [[*range(8)]], "names several"),
        (None, [[*range(8)]], "are groups of no axis; name it"),
    ],
)
def test_groups_that_are_none(axis_name, groups, message):
    run = partial(train, axis_name=axis_name, axis_index_groups=groups)
    mapped = jax.vmap(jax.vmap(run, axis_name="d"), axis_name="e")
    with pytest.raises(ValueError, match=message):
        mapped(split(X)[None])


def test_a_group_of_one_value():
    run = partial(train, axis_name="d", axis_index_groups=GROUPS["uneven"])
    with pytest.raises(ValueError, match=r"one on feature axes.* in a group of axis_index"):
        jax.vmap(run, axis_name="d")(X[:8, None])


def in_shard_map(names, check):
    """Two members, by vmap, on each of four devices."""
    mesh = make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    inner = jax.vmap(lambda x: train(x, axis_name=names)[0], axis_name="m")
    mapped = jax.shard_map(inner, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check)
    return np.asarray(jax.jit(mapped)(split(X))).reshape(X.shape)


def test_vmap_inside_of_shard_map():
    """A name for each level: pool over both, or one of the two."""

    def alone(parts):
        return np.concatenate([train(part)[0] for part in parts])

    close = partial(np.testing.assert_allclose, atol=5e-6)
    close(in_shard_map(("d", "m"), False), train(X)[0])
    close(in_shard_map("m", False), alone(X.reshape(4, 4, 3)))
    strided = split(X).reshape(4, 2, 2, 3).transpose(1, 0, 2, 3).reshape(2, 8, 3)
    expected = alone(strided).reshape(2, 4, 2, 3).transpose(1, 0, 2, 3).reshape(X.shape)
    close(in_shard_map("d", False), expected)
    if jax.__version_info__ >= (0, 10):  # jax 0.8.2 fails in it
        close(in_shard_map("d", True), expected)


@pytest.mark.parametrize("names", ["m", ("d", "m")])
def test_vmap_inside_of_shard_map_with_checks(names):
    """JAX has no such sum (seen in 0.8.2 to 0.12)."""
    with pytest.raises(NotImplementedError, match="check_vma=False"):
        in_shard_map(names, True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [None, GROUPS["pairs"]], ids=["whole", "groups"])
def test_two_collectives_forward_and_one_backward(groups, masked):
    """Per layer, of numbers per feature; a network's, where the gradient depends on y."""
    mesh = make_mesh((MEMBERS,), ("d",), axis_types=(AxisType.Auto,))
    where = np.ones(ROWS, bool) if masked else None

    def forward(x, where):
        return train(x, where=where, axis_name="d", axis_index_groups=groups)[0]

    def both(x, where):
        y, pull = jax.vjp(lambda x: forward(x, where), x)
        return pull(jnp.sin(y))[0]

    def count(function):
        run = jax.shard_map(function, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        args = jax.device_put((X, where), NamedSharding(mesh, P("d")))
        found = collectives(jax.jit(run).lower(*args).compile().as_text(), MEMBERS)
        assert all(kind == "all-reduce" and size <= 3 * 4 * 3 * 4 for kind, size in found)
        return len(found)

    assert (count(forward), count(both)) == (2, 3)
