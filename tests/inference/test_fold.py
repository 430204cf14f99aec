"""Folded is unfolded: the same map, within what float32 can tell.

The oracle evaluates the layer and Algorithm 2 in float64 on the same float32 values. With u half a
unit in the last place, size = |s|(|W||x| + |b| + |E x|) + |β| and n products in each sum, the
folded layer is off by at most (n + 9)u·size: s has 4 roundings, s·w one more, the sum n, the bias
s(b - E x) + β 3 besides those of s, and adding it one.

At E x = 100 standard deviations, size is a hundred times y or more, and what the bar asks, 2e-6 of
max|y|, depends on who carries the mean. The bias: b and E x cancel exactly, or nearly, before they
are multiplied, and the bar holds. The input: the sum xW is rounded at its own size, in the
unfolded layer too; no other kernel or bias mends that, and what is asked is that folding adds
little to it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import bn_jax as bn
from bn_jax.conform.oracle import U
from tests.core.draws import few, seeds

BAR = 2e-6
R = 100
EPSILON = 1e-5


def dense(x, kernel):
    return lax.dot_general(x, kernel, (((1,), (0,)), ((), ())))


@st.composite
def layers(draw):
    """A linear map of every kind: how it is folded, its map, and the shapes of x and kernel."""
    kind = draw(st.sampled_from(["dense", "conv", "conv", "transpose", "transposed kernel"]))
    out, channels = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 2, 5]))
    if kind == "dense":
        return bn.fold_dense, dense, (64, channels), (channels, out)
    rank = draw(st.integers(1, 2))
    window, strides, dilation = (
        tuple(draw(st.lists(st.integers(1, most), min_size=rank, max_size=rank)))
        for most in (3, 2, 2)
    )
    padding = draw(st.sampled_from(["SAME", "VALID", [(2, 1)] * rank]))
    spec = ("NHC", "HIO", "NHC") if rank == 1 else ("NHWC", "HWIO", "NHWC")
    shape = (16, *(7, 6)[:rank])
    options = {"dimension_numbers": spec, "rhs_dilation": dilation}
    if kind == "conv":
        groups = draw(st.sampled_from([1, 2, 4]))

        def conv(x, kernel):
            return lax.conv_general_dilated(
                x, kernel, strides, padding, feature_group_count=groups, **options
            )

        return bn.fold_conv, conv, (*shape, channels * groups), (*window, channels, out * groups)
    transposed = kind == "transposed kernel"

    def transpose(x, kernel):
        return lax.conv_transpose(
            x, kernel, strides, padding, transpose_kernel=transposed, **options
        )

    def fold(*values, **options):
        return bn.fold_conv_transpose(*values, transpose_kernel=transposed, **options)

    ends = (out, channels) if transposed else (channels, out)
    return fold, transpose, (*shape, channels), (*window, *ends)


def double(value):
    return np.asarray(value).astype(np.complex128 if np.iscomplexobj(value) else np.float64)


def oracle(linear, *values):
    """A linear map in double precision."""
    with jax.enable_x64(True):
        return np.asarray(linear(*map(jnp.asarray, map(double, values))))


def make(seed, linear, x_shape, kernel_shape, carrier, absent=(), dtype=np.float32):
    """A layer whose output has means of ±100 standard deviations, carried by its bias or input.

    Returns x, kernel, bias, params, state; y and size, in double precision.
    """
    random = np.random.default_rng([4, seed])

    def normal(shape):
        z = random.standard_normal(shape)
        return z + 1j * random.standard_normal(shape) if np.dtype(dtype).kind == "c" else z

    kernel, x = normal(kernel_shape), normal(x_shape)
    kernel, x = kernel.astype(dtype), (x + (R if carrier == "input" else 0)).astype(dtype)
    z = oracle(linear, x, kernel)
    batch = tuple(range(z.ndim - 1))
    bias = normal(z.shape[-1:]) + (R * random.choice([-1, 1], z.shape[-1:]) * z.std(batch)) * (
        carrier == "bias"
    )
    bias = None if "b" in absent else bias.astype(dtype)
    z = z + (0 if bias is None else double(bias))
    mean, var = z.mean(batch).astype(dtype), z.var(batch).astype(np.zeros(0, dtype).real.dtype)
    scale = None if "γ" in absent else (normal(mean.shape) + 2).astype(dtype)
    shift = None if "β" in absent else normal(mean.shape).astype(dtype)
    s = (1 if scale is None else double(scale)) / np.sqrt(double(var) + EPSILON)
    offset = 0 if shift is None else double(shift)
    y = s * (z - double(mean)) + offset
    size = oracle(linear, abs(x), abs(kernel)) + (0 if bias is None else abs(double(bias)))
    size = abs(s) * (size + abs(double(mean))) + abs(offset)
    params = bn.BatchNormParams(*(None if p is None else jnp.asarray(p) for p in (scale, shift)))
    state = bn.BatchNormState(jnp.asarray(mean), jnp.asarray(var), jnp.ones(mean.shape, jnp.int32))
    return x, kernel, bias, params, state, y, size


def terms(kernel_shape):
    return np.prod(kernel_shape)  # at most: the output's axis is one too many


def folded(fold, linear, x, kernel, bias, params, state):
    new, offset = fold(kernel, bias, params, state, epsilon=EPSILON)
    assert (new.shape, new.dtype, offset.dtype) == (kernel.shape, kernel.dtype, kernel.dtype)
    z = linear(x, new)
    return z + offset.reshape([1] * (z.ndim - 1) + [-1])


@settings(few, max_examples=10)  # each compiles
@given(layers(), seeds, st.sets(st.sampled_from("bγβ")))
def test_folded_is_unfolded(layer, seed, absent):
    fold, linear, *shapes = layer
    evaluate = jax.jit(partial(folded, fold, linear))  # one compilation for both
    for carrier, missing in (("bias", ()), ("input", absent)):
        *values, y, size = make(seed, linear, *shapes, carrier, missing)
        error = abs(evaluate(*values) - y)
        assert (error <= min((terms(shapes[1]) + 9) * U, BAR) * size).all()
        if carrier == "bias":
            assert error.max() <= BAR * abs(y).max()


CONV = (
    bn.fold_conv,
    lambda x, kernel: lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    ),
    (16, 7, 4),
    (3, 4, 5),
)
DENSE = (bn.fold_dense, dense, (64, 4), (4, 5))


@pytest.mark.parametrize("layer", [CONV, DENSE], ids=["conv", "dense"])
@pytest.mark.parametrize("carrier", ["bias", "input"])
def test_complex_numbers(layer, carrier):
    # A complex product is 4 real ones and 2 sums: 4 roundings for one, of each of two parts.
    fold, linear, *shapes = layer
    *values, y, size = make(0, linear, *shapes, carrier, dtype=np.complex64)
    error = abs(folded(fold, linear, *values) - y)
    assert (error <= 4 * (terms(shapes[1]) + 9) * U * size).all()


@pytest.mark.parametrize("layer", [CONV, DENSE], ids=["conv", "dense"])
def test_double_precision(layer, x64):
    # The oracle is as precise as what it judges, so the two differ by twice the bound.
    fold, linear, *shapes = layer
    *values, y, size = make(0, linear, *shapes, "input", dtype=np.float64)
    y_folded = folded(fold, linear, *values)
    assert y_folded.dtype == np.float64
    assert (abs(y_folded - y) <= 2 * (terms(shapes[1]) + 9) * 2.0**-53 * size).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_once(dtype):
    """Kernel and bias are the exact ones, rounded to the kernel's dtype: off by half an ulp."""
    fold, linear, *shapes = DENSE
    _, kernel, bias, params, state, *_ = make(1, linear, *shapes, "bias")
    kernel, bias = kernel.astype(dtype), bias.astype(dtype)
    new, offset = fold(kernel, bias, params, state, epsilon=EPSILON)
    assert new.dtype == offset.dtype == dtype
    s = double(params.scale) / np.sqrt(double(state.var) + EPSILON)
    exact = s * (double(bias) - double(state.mean)) + double(params.bias)
    half = float(jnp.finfo(dtype).eps) / 2
    slack = 9 * U * (abs(s) * abs(double(bias) - double(state.mean)) + abs(double(params.bias)))
    assert (abs(double(new) - s * double(kernel)) <= half * 1.001 * abs(s * double(kernel))).all()
    assert (abs(double(offset) - exact) <= half * abs(exact) + slack).all()


# The dense layer after.


@few
@given(
    st.sampled_from([(1, 1), (1, 4), (3, 1), (5, 7), (64, 10)]),
    seeds,
    st.sets(st.sampled_from("bγβ")),
    st.sampled_from([0, 1, R]),
)
def test_into_the_following_dense(shape, seed, absent, means):
    """Off by (2n + 13)u·size, size = (|x| + |E x|)|sW| + |βW| + |b|: see fold_dense's above.

    Up to means of one standard deviation, which is what an activation leaves, the bar holds, since
    size is no more than a few times max|y|; beyond, the error grows with the means.
    """
    random = np.random.default_rng([5, seed])
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    x, kernel = normal(256, shape[0]) + np.float32(means), normal(*shape)
    bias = None if "b" in absent else normal(shape[1])
    scale = None if "γ" in absent else normal(shape[0])
    shift = None if "β" in absent else normal(shape[0])
    mean, var = double(x).mean(0).astype(np.float32), double(x).var(0).astype(np.float32)
    params = bn.BatchNormParams(*(None if p is None else jnp.asarray(p) for p in (scale, shift)))
    state = bn.BatchNormState(jnp.asarray(mean), jnp.asarray(var), jnp.ones(shape[0], jnp.int32))
    s = (1 if scale is None else double(scale)) / np.sqrt(double(var) + EPSILON)
    offset = np.zeros(shape[0]) if shift is None else double(shift)
    b = 0 if bias is None else double(bias)
    y = ((double(x) - mean) * s + offset) @ double(kernel) + b
    size = (abs(double(x)) + abs(double(mean))) @ abs(s[:, None] * double(kernel))
    size = size + abs(offset) @ abs(double(kernel)) + abs(b)
    new, shifted = bn.fold_into_following_dense(kernel, bias, params, state, epsilon=EPSILON)
    assert (new.shape, shifted.shape) == (kernel.shape, (shape[1],))
    error = abs(dense(x, new) + shifted[None] - y)
    assert (error <= (2 * shape[0] + 13) * U * size).all()
    if means <= 1:
        assert error.max() <= BAR * abs(y).max()


def test_a_coarse_kernel_acts_on_what_is_centered():
    """The bias belongs to the kernel as rounded: what x = E x gives is b + βW, to bfloat16."""
    random = np.random.default_rng(6)
    kernel = jnp.asarray(random.standard_normal((16, 8)), jnp.bfloat16)
    mean = jnp.asarray(random.standard_normal(16) * 3, jnp.float32)
    state = bn.BatchNormState(mean, jnp.full(16, 0.7), jnp.ones(16, jnp.int32))
    params = bn.BatchNormParams(None, None)
    new, bias = bn.fold_into_following_dense(kernel, None, params, state)
    exact = -double(mean) @ double(new)
    np.testing.assert_allclose(double(bias), exact, rtol=2.0**-8, atol=1e-5)


# Transformations, and mistakes.


def test_is_a_function_like_any_other():
    """Under jit, vmap (an ensemble) and grad (training through the folded layer)."""
    fold, linear, *shapes = CONV
    members = [make(seed, linear, *shapes, "bias")[1:5] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    for together in (jax.vmap(fold), jax.jit(jax.vmap(fold))):
        for n, member in enumerate(members):
            for a, b in zip(together(*stacked), fold(*member), strict=True):
                np.testing.assert_allclose(a[n], b, rtol=8 * U, atol=8 * U)
    kernel, bias, params, state = members[0]
    slope = jax.grad(lambda p: fold(kernel, bias, p, state)[1].sum())(params)
    np.testing.assert_allclose(slope.bias, 1)


PARAMS, STATE = bn.init(5)
KERNEL, WINDOW = jnp.ones((4, 5)), jnp.ones((3, 4, 5))
COMPLEX = bn.init(5, dtype=jnp.complex64)
MISTAKES = {
    "conv as dense": (
        lambda: bn.fold_dense(WINDOW, None, PARAMS, STATE),
        ValueError,
        ["kernel has shape (3, 4, 5)", "fold_dense takes [in, features]", "fold_conv for Conv"],
    ),
    "dense as conv": (
        lambda: bn.fold_conv(KERNEL, None, PARAMS, STATE),
        ValueError,
        ["kernel has shape (4, 5)", "[*window, in/groups, features]"],
    ),
    "dense as conv transpose": (
        lambda: bn.fold_conv_transpose(KERNEL, None, PARAMS, STATE),
        ValueError,
        ["kernel has shape (4, 5)", "[*window, in, features]"],
    ),
    "conv as following dense": (
        lambda: bn.fold_into_following_dense(WINDOW, None, PARAMS, STATE),
        ValueError,
        ["kernel has shape (3, 4, 5)", "[features, out]"],
    ),
    "the other axis": (
        lambda: bn.fold_conv_transpose(WINDOW, None, PARAMS, STATE, transpose_kernel=True),
        ValueError,
        ["state.mean has shape (5,)", "kernel of shape (3, 4, 5)", "(4,)"],
    ),
    "following dense, its outputs": (
        lambda: bn.fold_into_following_dense(KERNEL, None, PARAMS, STATE),
        ValueError,
        ["state.mean has shape (5,)", "kernel of shape (4, 5)", "(4,)"],
    ),
    "bias": (
        lambda: bn.fold_dense(KERNEL, jnp.ones(1), PARAMS, STATE),
        ValueError,
        ["bias has shape (1,)", "(5,)"],
    ),
    "scale": (
        lambda: bn.fold_dense(KERNEL, None, PARAMS._replace(scale=jnp.ones(1)), STATE),
        ValueError,
        ["params.scale has shape (1,)", "(5,)"],
    ),
    "integers": (
        lambda: bn.fold_dense(np.ones((4, 5), np.int32), None, PARAMS, STATE),
        TypeError,
        ["kernel has dtype int32", "kernel.astype(jnp.float32)"],
    ),
    "integer bias": (
        lambda: bn.fold_dense(KERNEL, np.ones(5, np.int32), PARAMS, STATE),
        TypeError,
        ["bias has dtype int32", "bias.astype(jnp.float32)"],
    ),
    "complex": (
        lambda: bn.fold_dense(KERNEL, None, *COMPLEX),
        TypeError,
        ["state.mean has dtype complex64 and kernel float32", "kernel.astype(jnp.complex64)"],
    ),
    "complex variance": (
        lambda: bn.fold_dense(
            KERNEL.astype(jnp.complex64), None, PARAMS, COMPLEX[1]._replace(var=COMPLEX[1].mean)
        ),
        TypeError,
        ["state.var has dtype complex64, but a variance is real"],
    ),
    "no mean": (
        lambda: bn.fold_dense(KERNEL, None, PARAMS, STATE._replace(mean=None)),
        TypeError,
        ["state.mean is None", "bn_jax.measure"],
    ),
    "epsilon": (
        lambda: bn.fold_dense(KERNEL, None, PARAMS, STATE, epsilon=-1.0),
        ValueError,
        ["epsilon=-1.0"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_argument_value_and_remedy(name):
    call, kind, words = MISTAKES[name]
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_numbers_in_any_form_are_taken():
    """Lists and integers where numpy would take them; the result is the kernel's dtype."""
    params = bn.BatchNormParams([1.0, 2.0], np.array([0, 1]))
    state = bn.BatchNormState(np.array([1, 2]), [1.0, 4.0], [1, 1])
    for fold in (bn.fold_dense, bn.fold_into_following_dense):
        listed = fold([[1.0, 0.0], [0.0, 1.0]], [1.0, 2.0], params, state)
        arrays = [jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), t, is_leaf=is_row)
                  for t in (params, state)]  # fmt: skip
        exact = fold(jnp.eye(2), jnp.array([1.0, 2.0]), *arrays)
        jax.tree.map(np.testing.assert_array_equal, listed, exact)


def is_row(value):
    return isinstance(value, list)
