"""Couplings that were planted are found, and none where there is none."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax as bn
import bn_jax.layers.linen
import bn_jax.layers.nnx
from bn_jax.explain import assert_independent

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 3)), jnp.float32)
PARAMS, STATE = bn.init(3)
MASK = np.arange(4) < np.array([4, 2, 3, 3, 4, 1])[:, None]


def norm(x, state=STATE, **options):
    return bn.batch_norm(x, PARAMS, state, **options)[0]


def padded(x):
    """What is masked out is changed, as padding would."""
    return jnp.where(MASK[..., None], x, 0)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = bn_jax.layers.linen.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.relu(x).sum((1, 2))


@pytest.fixture(autouse=True)
def ordinary_rules(lenient):
    """For Flax, and for short functions; the doctest runs under strict rules."""


LINEN = Linen()
VARIABLES = LINEN.init(jax.random.key(0), X, False)


def linen(x, train):
    return LINEN.apply(VARIABLES, x, train, mutable=["batch_stats"])[0]


def nnx_model(x, train):
    model = bn_jax.layers.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    return model(x, use_running_average=not train)


def scanned(x, train):
    return jax.lax.scan(lambda x, _: (norm(x, train=train), None), x, length=2)[0]


def members(x, **options):
    """Training of the members of a vmap: each has four examples."""
    return jax.vmap(partial(norm, train=True, **options), axis_name="members")(x)


COUPLED = {
    "train flag left on": partial(norm, train=True),
    "under jit": jax.jit(partial(norm, train=True)),
    "in a scan": partial(scanned, train=True),
    "linen": partial(linen, train=True),
    "nnx": partial(nnx_model, train=True),
    "ghost groups": partial(norm, train=True, group_size=2),
    "statistics pooled over a vmap": partial(members, axis_name="members"),
    "one of several outputs": lambda x: {"a": 2 * x, "b": x[:, 0, 0] - x[::-1, 0, 0]},
    "attention over the batch": lambda x: jax.nn.softmax(x[:, 0] @ x[:, 0].T) @ x[:, 0],
}
INDEPENDENT = {
    "evaluation": partial(norm, train=False),
    "in a scan": partial(scanned, train=False),
    "linen": partial(linen, train=False),
    "nnx": partial(nnx_model, train=False),
    "members of a vmap": members,
    "statistics of each example": lambda x: (x - x.mean((1, 2), keepdims=True)) / 3,
    "integers": lambda x: (x, jnp.argmax(x, -1)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_couplings_are_found(name):
    with pytest.raises(
        AssertionError, match=r"output \d of f depends on example \d; .*train=False"
    ):
        assert_independent(COUPLED[name], X)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_none_where_there_is_none(name):
    assert_independent(INDEPENDENT[name], X)


@pytest.mark.parametrize("n", [2, 5])
def test_every_pair_is_found_and_named(n):
    x = jnp.ones((n, 1))
    for i in range(n):
        for j in range(n):
            f = lambda x, i=i, j=j: x.at[i].add(1e-3 * x[j])  # noqa: E731
            if i == j:
                assert_independent(f, x)
            else:
                with pytest.raises(
                    AssertionError, match=f"output {i} of f depends on example {j};"
                ):
                    assert_independent(f, x)


def test_groups_are_named():
    """Groups of two neighbours: example 1 has 0 beside it."""
    with pytest.raises(AssertionError, match="output 1 of f depends on example 0;"):
        assert_independent(partial(norm, train=True, group_size=2), X)


def test_what_it_costs():
    """2⌈log₂ 6⌉ = 6 derivatives, by one compilation."""
    ran, traced = [], []

    def f(x):
        traced.append(x.shape)
        jax.debug.callback(lambda: ran.append(1))
        return x

    assert_independent(f, X)
    jax.effects_barrier()
    assert len(ran) == 6
    assert len(traced) == 1


PADDING = ~MASK[..., None]


@pytest.mark.parametrize(
    ("f", "leaks"),
    [
        (lambda x: norm(padded(x), train=False).sum((1, 2)), False),
        (lambda x: norm(x, train=False).sum((1, 2)), True),
        (lambda x: x.mean(1), True),
        (lambda x: (x * MASK[..., None]).sum(1) / MASK.sum(1)[:, None], False),
    ],
)
def test_padding(f, leaks):
    assert_independent(f, X)
    if leaks:
        # All but those without padding.
        with pytest.raises(AssertionError, match=r"outputs \[1, 2, 3, 5\] of f depend on padding"):
            assert_independent(f, X, padding=PADDING)
    else:
        assert_independent(f, X, padding=PADDING)


@pytest.mark.parametrize("masked", [True, False])
def test_padding_in_the_statistics_of_training(masked):
    """Each member of the vmap is a batch of its own, so only its padding can reach it."""

    def f(x):
        def member(x, mask):
            y = norm(x, train=True, where=mask if masked else None)
            return jnp.where(mask[:, None], y, 0)

        return jax.vmap(member)(x, MASK)

    if masked:
        assert_independent(f, X, padding=PADDING)
    else:
        with pytest.raises(AssertionError, match="padding"):
            assert_independent(f, X, padding=PADDING)


def test_trees_and_other_axes():
    inputs = {"image": jnp.moveaxis(X, 0, 1), "label": jnp.zeros((2, 6), int)}
    assert_independent(lambda d: d["image"] + d["label"][:1, :, None], inputs, axis=1)
    with pytest.raises(AssertionError, match="example"):
        assert_independent(lambda d: d["image"][:, ::-1] * 2, inputs, axis=1)


def test_what_is_not_finite_is_a_dependence():
    """0 · ∞ in the derivative: an output that should not move is NaN."""
    with pytest.raises(AssertionError, match="output 3 of f depends on"):
        assert_independent(lambda x: x.at[3].set(jnp.sqrt(x[3] * 0)), X)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="two examples or more along axis 0"):
        assert_independent(lambda x: x, X[:1])
    with pytest.raises(ValueError, match=r"shapes \[\(6, 4, 3\), \(5,\)\]"):
        assert_independent(lambda x: x[0], (X, jnp.ones(5)))
    with pytest.raises(ValueError, match=r"output of f has shape \(3,\).*no states"):
        assert_independent(lambda x: bn.batch_norm(x, PARAMS, STATE, train=True), X)
    with pytest.raises(ValueError, match="integers only"):
        assert_independent(lambda x: x, jnp.arange(4))
