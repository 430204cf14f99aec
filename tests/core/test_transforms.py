"""Every kind of batch norm under every transformation of JAX: two tables, and their product.

A new variant joins by a row in CASES, a new transformation by a function under @transform; each
compares the transformed function with the plain one. All arrays have 16 rows, for 8 devices. Half
of the product runs with `-m slow`.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bn_jax as bn
from tests import devices

ROWS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One way to call `batch_norm`, or another normalizer.

    `apply` takes all that is data; differentiation goes through `real`, in which complex numbers
    are pairs of real ones.
    """

    shape: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Callable[[np.random.Generator], np.ndarray] | None = None
    features: int | tuple[int, ...] = 3
    dtype: Any = jnp.float32
    affine: bool = True
    train: bool = True
    normalizer: Callable[..., Any] = bn.batch_norm

    def given(self, seed=0):
        """X, params, state and where."""
        random = np.random.default_rng(seed)
        draw = lambda shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
        complex_data = jnp.issubdtype(self.dtype, jnp.complexfloating)
        x = draw(self.shape) + 2
        x = lax.complex(x, draw(self.shape)) if complex_data else x.astype(self.dtype)
        params, state = bn.init(
            self.features,
            use_scale=self.affine,
            use_bias=self.affine,
            dtype=jnp.complex64 if complex_data else jnp.float32,
        )
        params = jax.tree.map(lambda p: p + draw(p.shape).astype(p.dtype), params)
        state = state._replace(mean=state.mean + 1, var=state.var * 2)
        where = None if self.where is None else jnp.asarray(self.where(random))
        return x, params, state, where

    def apply(self, x, params, state, where=None, **options):
        """Y and the new state."""
        options = {"train": self.train, "where": where} | self.options | options
        return self.normalizer(x, params, state, **options)

    @functools.cached_property
    def run(self):
        """`apply`, compiled once."""
        return jax.jit(self.apply)

    @functools.cached_property
    def expected(self):
        """What `apply` makes of what is given."""
        return self.run(*self.given())

    @functools.cached_property
    def gradients(self):
        """The gradients of x and params for a loss of y."""
        x, params, state, where = self.given()
        loss = lambda x, params: curved(self.apply(x, params, state, where)[0])  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(x, params)

    @functools.cached_property
    def remembered(self):
        """The state after a Python loop over three batches."""
        xs, params, state, where = batches_of(self)
        for x in xs:
            _, state = self.run(x, params, state, where)
        return state

    def real(self):
        """A real function of one real array, and where to evaluate it."""
        x, params, state, where = self.given()
        if not jnp.iscomplexobj(x):
            return lambda v: self.apply(v, params, state, where)[0], x

        def function(v):
            y, _ = self.apply(lax.complex(v[0], v[1]), params, state, where)
            return jnp.stack([y.real, y.imag])

        return function, jnp.stack([x.real, x.imag])

    def loss(self):
        """A curved loss of one real array, and where to evaluate it."""
        function, at = self.real()
        return lambda v: curved(function(v)), at

    @property
    def slack(self):
        """Two half-precision roundings, or a few of float32."""
        return 2.0**-7 if self.dtype == jnp.bfloat16 else 1e-5


def curved(y):
    """A loss of y, with derivatives of all orders."""
    weights = np.random.default_rng(9).standard_normal(y.shape).astype(np.float32)
    return jnp.tanh((y.real + 2 * y.imag).astype(jnp.float32) * weights).sum()


def batches_of(case):
    """Three batches, with the rest as given."""
    x, *rest = case.given()
    return jnp.stack([x, x[::-1] * 2, x - 1]), *rest


def some(random):
    return random.random(ROWS) < 0.7


def weigh(random):
    return random.uniform(0, 3, (ROWS, 3)).astype(np.float32)


# Clipped for some features, schedules of the count among the limits.
RAMP = {"r_max": 1.2, "d_max": lambda count: 0.5 + 0.1 * jnp.minimum(count, 3).astype(jnp.float32)}

CASES = {
    "plain": Case((ROWS, 3)),
    "mask": Case((ROWS, 3), where=some),
    "weights": Case((ROWS, 3), where=weigh),
    "several axes": Case((ROWS, 2, 3), {"feature_axis": (1, 2)}, features=(2, 3)),
    "without affine": Case((ROWS, 3), affine=False),
    "inference": Case((ROWS, 3), train=False),
    "channels first": Case((ROWS, 3, 2, 2), {"feature_axis": 1}),
    "bfloat16": Case((ROWS, 3), dtype=jnp.bfloat16),
    "complex64": Case((ROWS, 3), dtype=jnp.complex64),
    "ghost": Case((ROWS, 4, 3), {"group_size": 2}),
    "renorm": Case((ROWS, 3), RAMP, where=some, normalizer=bn.batch_renorm),
    "ghost renorm": Case((ROWS, 4, 3), RAMP | {"group_size": 2}, normalizer=bn.batch_renorm),
}
TRANSFORMS = {}


def transform(check):
    TRANSFORMS[check.__name__] = check
    return check


def assert_same(actual, expected, slack):
    """Same structure, dtypes and shapes; values up to slack of the largest."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        wide = np.complex128 if np.iscomplexobj(b) else np.float64
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        np.testing.assert_allclose(a, b, rtol=0, atol=slack * max(1, np.abs(b).max(initial=0)))


# Compilation.


@transform
def jit_twice_compiles_once(case):
    """Strategies are static arguments equal by value."""
    traces = []

    @partial(jax.jit, static_argnames=("average", "train"))
    def run(x, params, state, where, epsilon, **static):
        traces.append(static)
        return case.apply(x, params, state, where, epsilon=epsilon, **static)

    for decay, epsilon in (0.9, 1e-5), (0.9, 1e-3), (0.9, 1e-3):
        run(*case.given(), epsilon, average=bn.Ema(decay), train=case.train)
    assert len(traces) == 1
    run(*case.given(), 1e-3, average=bn.Ema(0.8), train=case.train)
    assert len(traces) == 2


@transform
def eval_shape(case):
    shapes = jax.eval_shape(case.apply, *case.given())
    describe = partial(jax.tree.map, lambda a: (a.shape, a.dtype))
    assert describe(shapes) == describe(case.expected)


@transform
def export_for_all_platforms(case):
    given = case.given()
    exported = export.export(jax.jit(case.apply), platforms=("cpu", "cuda", "tpu"))(*given)
    if importlib.util.find_spec("flatbuffers"):  # which JAX needs to write it down
        exported = export.deserialize(exported.serialize())
    assert_same(exported.call(*given), case.expected, case.slack)


@transform
def export_for_any_batch_size(case):
    """Also of the gradients; ghost groups need to know how many examples there are."""
    x, params, state, where = case.given()
    (size,) = export.symbolic_shape("b")

    def symbolic(array):
        return jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)

    def step(x, where):
        def loss(x, params):
            y, new = case.apply(x, params, state, where)
            return jnp.sum(jnp.sin(y.real.astype(jnp.float32))), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    described = jax.tree.map(symbolic, (x, where))
    if "group_size" in case.options:
        with pytest.raises(Exception, match="inconclusive"):
            export.export(jax.jit(step))(*described)
        return
    gradients, out = export.export(jax.jit(step))(*described).call(x, where)
    assert_same(out, case.expected, case.slack)
    assert_same(gradients, jax.jit(step)(x, where)[0], 4 * case.slack)


@transform
def compile_time_evaluation(case):
    """Of known values, a traced function may know the result."""
    given = case.given()

    @jax.jit
    def run():
        with jax.ensure_compile_time_eval():
            y, new = case.apply(*given)
        assert not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((y, new)))
        return y, new

    assert_same(run(), case.expected, case.slack)


@transform
def donation(case):
    """The old state's memory becomes the new one's."""
    x, params, state, where = case.given()
    actual = jax.jit(case.apply, donate_argnums=2)(x, params, state, where)
    assert all(leaf.is_deleted() for leaf in state)
    assert_same(actual, case.expected, case.slack)


@transform
def no_jit_but_debug_nans(case):
    """Step by step, so that no NaN is made on the way either."""
    with jax.debug_nans(True):
        assert_same(case.apply(*case.given()), case.expected, case.slack)
        loss, at = case.loss()
        jax.grad(loss)(at)


@transform
def leak_check(case):
    with jax.checking_leaks():
        loss, at = case.loss()
        jax.jit(jax.grad(loss))(at)


@transform
def x64(case):
    """Enabling double precision changes nothing for what is not in double precision."""
    given, expected = case.given(), case.expected
    with jax.enable_x64(True):
        assert_same(jax.jit(case.apply)(*given), expected, case.slack)


# Differentiation.


def tangent_of(at):
    return jnp.asarray(np.random.default_rng(4).standard_normal(at.shape)).astype(at.dtype)


@transform
def grad(case):
    """The gradient along a direction is the forward derivative along it."""
    loss, at = case.loss()
    along = tangent_of(at)
    gradient = jax.jit(jax.grad(loss))(at)
    _, pushed = jax.jit(partial(jax.jvp, loss))((at,), (along,))
    products = (gradient * along).astype(jnp.float32)
    size = np.abs(products).sum()
    np.testing.assert_allclose(products.sum(), pushed, rtol=0, atol=case.slack * max(size, 1))
    assert gradient.dtype == at.dtype


@transform
def grad_of_params(case):
    x, params, state, where = case.given()
    along = jax.tree.map(tangent_of, params)

    @jax.jit
    def changes(params):
        """Of the loss, by each y that changes with the parameters."""
        run = lambda params: case.apply(x, params, state, where)[0]  # noqa: E731
        y, pushed = jax.jvp(run, (params,), (along,))
        # For complex numbers, jax.grad gives the conjugate of what steps downhill: none here.
        return (jax.grad(curved)(y) * pushed).real.astype(jnp.float32)

    inner = jax.tree.map(lambda a, b: (a * b).real.sum(), case.gradients[1], along)
    each = changes(params)
    slack = case.slack * np.abs(each).sum() + 1e-6
    assert abs(sum(jax.tree.leaves(inner)) - each.sum()) <= slack


@transform
def linearize(case):
    function, at = case.real()
    along = tangent_of(at)
    y, push = jax.linearize(function, at)
    assert_same((y, push(along)), jax.jvp(function, (at,), (along,)), case.slack)


@transform
def linear_transpose(case):
    """The derivative can be transposed as such, which is what reverse mode does."""
    function, at = case.real()
    y, push = jax.linearize(function, at)
    (transposed,) = jax.linear_transpose(push, at)(tangent_of(y))
    (pulled,) = jax.vjp(function, at)[1](tangent_of(y))
    assert_same(transposed, pulled, case.slack)


@transform
def hessian(case):
    """Forward over reverse is reverse over reverse; and it is symmetric."""
    loss, at = case.loss()
    one, other = tangent_of(at), tangent_of(at)[::-1]
    gradient = jax.grad(loss)
    inner = lambda a, b: (a * b).astype(jnp.float32).sum()  # noqa: E731

    @jax.jit
    def products(at):
        _, (forward, turned) = jax.vmap(partial(jax.jvp, gradient, (at,)), out_axes=(None, 0))(
            (jnp.stack([one, other]),)
        )
        return forward, turned, jax.grad(lambda at: inner(gradient(at), one))(at)

    forward, turned, reverse = products(at)
    slack = 4 * case.slack  # half precision rounds each of a few steps of either way
    assert_same(forward, reverse, slack)
    size = np.abs(np.asarray(turned, np.float32)).sum()
    difference = inner(forward, other) - inner(turned, one)
    assert abs(difference) <= slack * max(size, 1)


@transform
def checkpoint(case):
    x, params, state, where = case.given()
    run = jax.checkpoint(lambda x, params: case.apply(x, params, state, where)[0])
    gradients = jax.jit(jax.grad(lambda *at: curved(run(*at)), (0, 1)))(x, params)
    assert_same(gradients, case.gradients, case.slack)


@transform
def checkpoint_with_jax_remat3(case):
    """JAX's coming default; JAX_REMAT3=1 runs all of this file under it."""
    if not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this JAX has no such flag")
    before = jax.config.jax_remat3
    try:
        jax.config.update("jax_remat3", True)
        checkpoint(case)
    finally:
        jax.config.update("jax_remat3", before)


@transform
def jet_of_second_order(case):
    """Along a line, the second term is the derivative of the first."""
    if case.dtype != jnp.float32 or case.options.get("axis_name"):
        pytest.skip("JAX's jet knows neither complex nor mixed dtypes")
    x, params, state, where = case.given()
    along = tangent_of(x)
    run = lambda x: case.apply(x, params, state, where)[0]  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        y, (first, second) = jet.jet(run, (x,), ((along, jnp.zeros_like(x)),))
    push = lambda x: jax.jvp(run, (x,), (along,))[1]  # noqa: E731
    wanted, (once, twice) = run(x), jax.jvp(push, (x,), (along,))
    assert_same((y, first), (wanted, once), case.slack)
    size = max(float(jnp.abs(twice).max()), 1)
    assert_same(second / size, twice / size, 10 * case.slack)


# Loops and branches.


@transform
def scan_with_the_state_as_carry(case):
    xs, params, state, where = batches_of(case)

    def step(state, x):
        y, state = case.apply(x, params, state, where)
        return state, y

    final, ys = jax.jit(partial(lax.scan, step))(state, xs)
    assert_same(final, case.remembered, case.slack)
    assert_same(ys[0], case.expected[0], case.slack)


@transform
def while_loop(case):
    xs, params, state, where = batches_of(case)

    def body(carry):
        step, state = carry
        return step + 1, case.apply(xs[step], params, state, where)[1]

    _, final = jax.jit(partial(lax.while_loop, lambda carry: carry[0] < 3, body))((0, state))
    assert_same(final, case.remembered, case.slack)


@transform
def cond_on_a_traced_flag(case):
    """How to choose between training and inference at run time: both branches are static."""
    x, params, state, where = case.given()
    branches = [partial(case.apply, train=train) for train in (False, True)]
    run = jax.jit(lambda flag, *given: lax.cond(flag, branches[1], branches[0], *given))
    assert_same(run(case.train, x, params, state, where), case.expected, case.slack)
    y, _ = run(not case.train, x, params, state, where)
    assert (np.asarray(y) != np.asarray(case.expected[0])).any()


# vmap, in both its meanings.


@transform
def vmap_of_independent_members(case):
    xs, *rest = batches_of(case)
    axes = (0, None, None, None)
    actual = jax.jit(jax.vmap(case.apply, axes))(xs, *rest)
    expected = [case.run(x, *rest) for x in xs]
    if not case.train:
        actual, expected = actual[0], [y for y, _ in expected]
    assert_same(actual, jax.tree.map(lambda *parts: jnp.stack(parts), *expected), case.slack)


@transform
def vmap_of_vmap(case):
    xs, params, state, where = batches_of(case)
    states = jax.tree.map(lambda s: jnp.stack([s, s + jnp.ones_like(s)]), state)
    inner = jax.vmap(case.apply, (0, None, None, None))
    ys, news = jax.jit(jax.vmap(inner, (None, None, 0, None)))(xs, params, states, where)
    for i, j in np.ndindex(2, 3):
        expected = case.run(xs[j], params, jax.tree.map(lambda s, i=i: s[i], states), where)
        new = jax.tree.map(lambda s, i=i, j=j: s[i, j] if s.ndim > state.mean.ndim else s[i], news)
        if case.train:
            assert_same(new, expected[1], case.slack)
        assert_same(ys[i, j], expected[0], case.slack)


def split(tree, *sizes):
    """Rows into members."""
    return jax.tree.map(lambda a: a.reshape(*sizes, -1, *a.shape[1:]), tree)


@transform
def vmap_over_examples(case):
    """With axis_name, members are parts of one batch."""
    x, params, state, where = case.given()
    member = partial(case.apply, axis_name="members")
    mapped = jax.vmap(member, (0, None, None, 0), (0, None), axis_name="members")
    y, new = jax.jit(mapped)(split(x, 4), params, state, split(where, 4))
    assert_same((y.reshape(x.shape), new), case.expected, case.slack)


@transform
def vmap_over_two_axes_of_examples(case):
    x, params, state, where = case.given()
    mapped = partial(case.apply, axis_name=("rows", "columns"))
    for name in "rows", "columns":
        mapped = jax.vmap(mapped, (0, None, None, 0), (0, None), axis_name=name)
    y, new = jax.jit(mapped)(split(x, 2, 4), params, state, split(where, 2, 4))
    assert_same((y.reshape(x.shape), new), case.expected, case.slack)


def loss_by_members(case):
    """A function of x and params, in which members are parts of one batch; and the two."""
    x, params, state, where = case.given()
    member = partial(case.apply, axis_name="members")
    mapped = jax.vmap(member, (0, None, None, 0), (0, None), axis_name="members")

    def loss(x, params):
        y, _ = mapped(split(x, 4), params, state, split(where, 4))
        return curved(y.reshape(x.shape))

    return loss, x, params


@transform
def grad_of_vmap_over_examples(case):
    """No gradient is lost between members."""
    loss, x, params = loss_by_members(case)
    assert_same(jax.jit(jax.grad(loss, (0, 1)))(x, params), case.gradients, 4 * case.slack)


@transform
def grad_of_staged_vmap_over_examples(case):
    """Differentiated when the names are bound no more: around jit, scan, cond and checkpoint."""
    loss, x, params = loss_by_members(case)

    def scanned(x, params):
        return lax.scan(lambda carry, _: (carry + loss(x, params), None), 0.0, length=1)[0]

    def chosen(x, params):
        return lax.cond(x.shape[0] > 0, loss, lambda x, params: 0.0, x, params)

    for staged in jax.jit(loss), scanned, chosen, jax.checkpoint(loss):
        assert_same(jax.jit(jax.grad(staged, (0, 1)))(x, params), case.gradients, 4 * case.slack)


# Devices.


def mesh_of(axis_type, *sizes):
    names = ("i", "j")[: len(sizes)]
    return devices.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes))


def shard_map_on(axis_type, case, sizes=(8,)):
    x, params, state, where = case.given()
    mesh = mesh_of(axis_type, *sizes)
    rows, names = P(mesh.axis_names), mesh.axis_names if len(sizes) > 1 else "i"
    member = partial(case.apply, axis_name=names)
    # That the state may be returned as replicated is checked by shard_map itself.
    specs = (rows, P(), P(), rows)
    sharded = jax.shard_map(member, mesh=mesh, in_specs=specs, out_specs=(rows, P()))
    expected = case.expected
    with jax.set_mesh(mesh):
        x, where = jax.device_put((x, where), NamedSharding(mesh, rows))
        assert_same(jax.jit(sharded)(x, params, state, where), expected, case.slack)


@transform
def shard_map_on_an_auto_mesh(case):
    shard_map_on(AxisType.Auto, case)


@transform
def shard_map_on_an_explicit_mesh(case):
    shard_map_on(AxisType.Explicit, case)


@transform
def shard_map_over_two_axes(case):
    shard_map_on(AxisType.Auto, case, (2, 4))


@transform
def grad_of_shard_map(case):
    x, params, state, where = case.given()
    mesh = mesh_of(AxisType.Auto, 8)
    member = partial(case.apply, axis_name="i")
    specs = (P("i"), P(), P(), P("i"))
    sharded = jax.shard_map(member, mesh=mesh, in_specs=specs, out_specs=(P("i"), P()))

    loss = lambda x, params: curved(sharded(x, params, state, where)[0])  # noqa: E731
    assert_same(jax.jit(jax.grad(loss, (0, 1)))(x, params), case.gradients, 4 * case.slack)


def jit_on(axis_type, case, sizes=(8,)):
    """Without axis_name: the array is one, the devices are JAX's concern."""
    x, params, state, where = case.given()
    expected = case.expected
    mesh = mesh_of(axis_type, *sizes)
    with jax.set_mesh(mesh):
        place = partial(jax.device_put, device=NamedSharding(mesh, P(mesh.axis_names)))
        for mask in [where] if where is None else [where, place(where)]:
            y, new = jax.jit(case.apply)(place(x), params, state, mask)
            assert y.sharding.is_equivalent_to(place(x).sharding, x.ndim)
            assert all(leaf.sharding.is_fully_replicated for leaf in new)
            assert_same((y, new), expected, case.slack)


@transform
def jit_on_an_auto_mesh(case):
    jit_on(AxisType.Auto, case)


@transform
def jit_on_an_explicit_mesh(case):
    jit_on(AxisType.Explicit, case)


@transform
def grad_on_an_explicit_mesh(case):
    x, params, state, where = case.given()
    loss = lambda x, params: curved(case.apply(x, params, state, where)[0])  # noqa: E731
    mesh = mesh_of(AxisType.Explicit, 8)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("i")))
        actual = jax.jit(jax.grad(loss, (0, 1)))(x, params)
        assert_same(actual, case.gradients, 4 * case.slack)


@transform
def pmap(case):
    x, params, state, where = case.given()

    def member(x, where):
        return case.apply(x, params, state, where, axis_name="devices")

    y, new = devices.pmap(member, "devices", out_axes=(0, None))(split(x, 8), split(where, 8))
    assert_same((y.reshape(x.shape), new), case.expected, case.slack)


def cells():
    """The product; by default two kinds, and a third of the others, of each row and column.

    Ghost groups and renorm have rows of their own, so that of both together runs with `-m slow`.
    """
    for i, (kind, case) in enumerate(CASES.items()):
        for j, (name, check) in enumerate(TRANSFORMS.items()):
            quick = kind in ("plain", "bfloat16") or (i + j) % 3 == 0
            quick = quick and kind != "ghost renorm"
            marks = [] if quick else pytest.mark.slow
            yield pytest.param(case, check, id=f"{kind}-{name}", marks=marks)


@pytest.mark.parametrize(("case", "check"), list(cells()))
def test_transforms(case, check):
    check(case)


def test_named_tuples_are_registered_for_export():
    """So that an exported function that takes or returns them can be written down."""
    for kind in bn.BatchNormParams, bn.BatchNormState, bn.Moments:
        with pytest.raises(ValueError, match="Duplicate serialization registration for type"):
            export.register_namedtuple_serialization(kind, serialized_name=f"my {kind.__name__}")
    if importlib.util.find_spec("flatbuffers"):
        x, where = np.ones((4, 3), np.float32), np.ones(4, np.float32)
        exported = export.export(jax.jit(lambda x, where: bn.measure(x, where=where)))(x, where)
        moments = export.deserialize(exported.serialize()).call(x, where)
        jax.tree.map(np.testing.assert_array_equal, moments, bn.measure(x, where=where))


EXPLICIT = [(P("r", "f"), P(), P()), (P("r", "f"), P("f"), P()), (P("r"), P("f"), P("f"))]


@pytest.mark.parametrize(("rows", "affine", "remembered"), EXPLICIT, ids=str)
def test_features_sharded_over_an_explicit_mesh(rows, affine, remembered):
    """Parameters and state may be sharded otherwise; each keeps its own sharding, as y has x's."""
    case = CASES["plain"]
    x, params, state, _ = Case((ROWS, 4), features=4).given()

    def run(train, x, params, state):
        def loss(params):
            y, new = case.apply(x, params, state, train=train)
            return curved(y), (y, new)

        return jax.grad(loss, has_aux=True)(params)

    mesh = devices.make_mesh((4, 2), ("r", "f"), axis_types=(AxisType.Explicit,) * 2)
    for train in True, False:
        expected = run(train, x, params, state)
        with jax.set_mesh(mesh):
            put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
            given = put(x, rows), put(params, affine), put(state, remembered)
            actual = jax.jit(partial(run, train))(*given)
            kinds = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (actual, given))
            (gradients, (y, new)), (x_kind, params_kind, state_kind) = kinds
            assert (gradients, y, new) == (params_kind, x_kind, state_kind)
            assert_same(actual, expected, 4 * case.slack)
