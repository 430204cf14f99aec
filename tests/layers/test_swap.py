"""Our batch norms in an existing model of flax.nnx, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import bn_jax as bn
from bn_jax.layers.nnx import BatchNorm
from bn_jax.layers.swap import swap, swap_back
from tests.layers.draws import normal

X = normal((16, 5), 3, 2)
pytestmark = pytest.mark.usefixtures("lenient")


class Special(nnx.BatchNorm):
    """A subclass, which may do anything."""


class Network(nnx.Module):
    """A batch norm in a list, in a dict, used twice, alone, and one of a subclass."""

    def __init__(self, norm=nnx.BatchNorm):
        rngs = nnx.Rngs(1)
        make = lambda: norm(5, momentum=0.9, rngs=rngs)  # noqa: E731
        self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs), make(), nnx.relu])
        self.by_name = nnx.Dict({"norm": make()})
        self.again = self.layers[1]
        self.last = make()
        self.special = Special(5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.special(self.last(self.again(self.by_name["norm"](x))))


def arrays(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def test_a_layer_used_twice_in_tree_mode(tree_mode):
    model = Network()
    with pytest.raises(ValueError, match="shared references"):
        nnx.state(model)
    assert sorted(swap(model)) == ["again", "by_name.norm", "last"]
    assert model.again is model.layers[1]
    assert sorted(swap_back(model)) == ["again", "by_name.norm", "last"]


def test_all_of_flax_become_ours_where_they_are(graph_mode):
    model = Network()
    objects = lambda: [  # noqa: E731
        *(model.layers[1], model.by_name["norm"], model.last),
        *(model.last.mean, model.again.scale),
    ]
    before = objects()
    values = arrays(model)
    assert sorted(swap(model)) == ["again", "by_name.norm", "last"]
    assert all(a is b for a, b in zip(before, objects(), strict=True))
    assert type(model.layers[1]) is type(model.by_name["norm"]) is type(model.last) is BatchNorm
    assert model.again is model.layers[1]
    assert type(model.special) is Special
    jax.tree.map(np.testing.assert_array_equal, arrays(model), values)
    assert swap(model) == []


def test_a_swapped_model_is_one_that_was_made_of_ours(graph_mode):
    model, ours = Network(), Network(BatchNorm)
    swap(model)
    assert nnx.graphdef(model) == nnx.graphdef(ours)
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(run(model, X), run(ours, X))
    jax.tree.map(np.testing.assert_array_equal, arrays(model), arrays(ours))


def test_there_and_back(graph_mode):
    model, theirs = Network(), Network()
    assert swap(model) == swap_back(model)
    assert nnx.graphdef(model) == nnx.graphdef(theirs)
    np.testing.assert_array_equal(model(X), theirs(X))
    jax.tree.map(np.testing.assert_array_equal, arrays(model), arrays(theirs))


def test_evaluation_is_the_same_before_and_after(graph_mode):
    model = Network()
    model(X)
    model.eval()
    before = model(X)
    swap(model)
    np.testing.assert_allclose(model(X), before, atol=1e-5)


def test_training_goes_on_with_the_optimizer_it_had(graph_mode):
    model = Network()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: (model(X) ** 4).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer)]
    swap(model)
    losses += [step(model, optimizer) for _ in range(20)]
    swap_back(model)
    losses += [step(model, optimizer) for _ in range(3)]
    assert losses[-1] < losses[3] < losses[0]


def test_a_model_that_is_a_batch_norm():
    layer = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    assert swap(layer) == [""]
    assert type(layer) is BatchNorm


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("average", bn.DebiasedEma(0.9)),
        ("unbiased", True),
        ("group_size", 4),
        ("renorm", (3.0, 5.0)),
    ],
)
def test_what_flax_cannot_do_stays(name, value):
    model = nnx.Sequential(
        BatchNorm(5, rngs=nnx.Rngs(0)), BatchNorm(5, rngs=nnx.Rngs(0), **{name: value})
    )
    with pytest.raises(ValueError, match=rf"layers\.1 has {name}="):
        swap_back(model)
    assert type(model.layers[0]) is type(model.layers[1]) is BatchNorm
    assert jnp.isfinite(model(X)).all()


@pytest.mark.parametrize("change", [swap, swap_back])
def test_a_linen_module_holds_no_layers(change):
    with pytest.raises(TypeError, match=r"^Sequential is a module of flax.linen, .*layers.linen"):
        change(linen.Sequential([linen.BatchNorm()]))
