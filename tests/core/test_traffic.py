"""What a training step reads and writes: x and dy some times over, y and dx once, no more."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import bn_jax as bn
from bn_jax.bench.peers import OURS
from bn_jax.bench.stack import make_stack

pytestmark = pytest.mark.optimized

SHAPE = (16, 28, 28, 32)
on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA's CPU compiler")
fuses = pytest.mark.skipif(
    jax.__version_info__ < (0, 10) or jax.default_backend() != "cpu",
    reason="XLA's CPU sums what it has written first",
)


def training_step(x, params, state, dy, where=None):
    train = functools.partial(bn.batch_norm, state=state, train=True, where=where)
    y, pullback, state = jax.vjp(train, x, params, has_aux=True)
    return y, state, pullback(dy)


def written(dtype, shape=SHAPE):
    """The arrays of x's size, in dtypes, that the compiled step writes."""
    params, state = bn.init(shape[-1])
    x = jax.ShapeDtypeStruct(shape, dtype)
    step = lambda *args: training_step(*args)  # noqa: E731 - a new one, traced anew
    hlo = jax.jit(step).lower(x, params, state, x).compile().as_text()
    entry = hlo[hlo.index("\nENTRY") :]
    size = ",".join(map(str, shape))
    return sorted(re.findall(rf"= (\w+)\[{size}\]\S* (?!parameter)[\w-]+\(", entry))


@fuses
def test_only_y_and_dx_are_written_in_float32():
    assert written(jnp.float32) == ["f32", "f32"]


@fuses
def test_only_y_and_dx_are_written_in_half_precision():
    assert written(jnp.bfloat16) == ["bf16", "bf16"]


@on_a_cpu
def test_each_direction_reads_what_it_sums_once():
    """All that a pass sums is one reduction of several arrays.

    With a mask, forward also passes over x for the origin, which takes all of it.
    """
    params, state = bn.init(SHAPE[-1])
    x = jnp.zeros(SHAPE)
    for where, together in ((None, ["2", "2"]), (x > 0, ["3", "3", "2"])):
        step = functools.partial(training_step, where=where)
        hlo = jax.jit(step).lower(x, params, state, x).as_text()
        assert re.findall(r"%\d+:(\d) = stablehlo.reduce\(", hlo) == together


@on_a_cpu
def test_a_layer_of_half_precision_keeps_x_alone(shape=(8, 16, 16, 16)):
    """Among convolutions: x, and ReLU's result in float32, are 3 times x.

    Without a barrier XLA's CPU compiler (since jaxlib 0.10) keeps the wide x of which x was made;
    with a conversion to bfloat16 also y, for the sign that ReLU's derivative asks for. Before 0.10
    it keeps y either way.
    """

    def kept(depth):
        params, state, loss = make_stack(OURS, shape, depth)
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, state, x).compile()
        return step.memory_analysis().temp_size_in_bytes / (2 * x.size)

    assert (kept(4) - kept(2)) / 2 < (3.5 if jax.__version_info__ >= (0, 10) else 4.5)


@fuses
def test_sums_one_by_one_would_write_more(monkeypatch):
    """The proof can fail."""
    apart = lambda arrays, axes, _: [jnp.sum(a, axes, keepdims=True) for a in arrays]  # noqa: E731
    monkeypatch.setattr("bn_jax.core.centered.add_together", apart)
    assert len(written(jnp.float32)) > 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_x_and_numbers_per_feature_are_kept_for_the_backward_pass(dtype, masked, shape=(64, 32)):
    """And a mask, where there is one."""
    params, state = bn.init(shape[-1])
    where = jnp.ones(shape, bool) if masked else None

    def pullback(x, params):
        train = lambda x, params: bn.batch_norm(x, params, state, train=True, where=where)[0]  # noqa: E731
        return jax.vjp(train, x, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, jnp.zeros(shape, dtype), params))
    large = sorted(str(a.dtype) for a in kept if a.size > 4 * shape[-1])
    assert large == sorted([str(jnp.dtype(dtype)), *(["bool"] if masked else [])])
