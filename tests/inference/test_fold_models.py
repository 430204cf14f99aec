"""Whole models without batch norms: the same results, and a report of every batch norm."""

import inspect
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.layers.linen as our_linen
import bn_jax.layers.nnx as our_nnx
from bn_jax.bench.fold import deep_linen
from bn_jax.inference.fold_chain import DENSE, LINEAR, ChainLayer, fold_chain
from bn_jax.inference.fold_models import fold_linen, fold_nnx, identity
from tests.layers.flax_modes import set_modes

BAR = 2e-6
RNGS = nnx.Rngs(0)


def shaken(tree):
    """Values as training leaves them: no zeros and ones, and variances that are positive."""
    random = np.random.default_rng(0)

    def shake(path, value):
        noise = random.standard_normal(value.shape).astype(value.dtype)
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        fan_in = np.sqrt(np.prod(value.shape[:-1]))
        return jnp.asarray(1 + abs(noise) if names & {"var", "scale"} else noise / fan_in)

    return jax.tree_util.tree_map_with_path(shake, tree)


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def same(folded, whole):
    folded, whole = (np.asarray(y, np.float64) for y in (folded, whole))
    assert abs(folded - whole).max() <= 2 * BAR * abs(whole).max()  # either is off by the bar


def run(model, variables, x):
    return jax.jit(model.apply)(variables, x)


def lines(report):
    return str(report).splitlines()


# linen


def linen_norm(batch_norm=our_linen.BatchNorm, **options):
    return batch_norm(use_running_average=True, **options)


def initialized(layers, *shape):
    model, x = nn.Sequential(layers), inputs(*shape)
    variables = shaken(jax.eval_shape(lambda: model.init(jax.random.key(0), x)))
    return model, variables, x


@pytest.mark.parametrize("batch_norm", [our_linen.BatchNorm, nn.BatchNorm])
def test_linen(batch_norm, lenient):
    norm = linen_norm(batch_norm)
    model, variables, x = initialized(
        [
            nn.Conv(8, (3, 3), use_bias=False, strides=2, feature_group_count=2),
            norm,
            nn.relu,
            nn.Sequential([nn.ConvTranspose(6, (2, 2), transpose_kernel=True), norm.clone()]),
            linen_norm(batch_norm, use_scale=False),
            nn.relu,
            lambda x: x.reshape(len(x), -1),
            linen_norm(batch_norm, epsilon=0.1),
            nn.Dense(5, use_bias=False),
            linen_norm(batch_norm, use_bias=False),
        ],
        *(4, 7, 6, 4),
    )
    before = jax.tree.map(np.asarray, variables)
    folded, fewer, report = fold_linen(model, variables)
    assert lines(report) == [
        "layers_1 BatchNorm: folded into layers_0 Conv",
        "layers_4 BatchNorm: stays: follows layers_3 Sequential, precedes layers_5 relu",
        "layers_7 BatchNorm: folded into layers_8 Dense",
        "layers_9 BatchNorm: folded into layers_8 Dense",
        "layers_3/layers_1 BatchNorm: folded into layers_3/layers_0 ConvTranspose",
    ]
    same(run(folded, fewer, x), run(model, variables, x))
    assert list(fewer["batch_stats"]) == ["layers_4"] == [report.stays[0].batch_norm[:8]]
    assert list(fewer["params"]) == ["layers_0", "layers_3", "layers_4", "layers_8"]
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert model.layers[0].use_bias is False
    # It is what the new module makes for itself.
    made = jax.eval_shape(lambda: folded.init(jax.random.key(0), x))
    shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)  # noqa: E731
    assert shapes(made) == shapes(fewer)


def test_linen_used_twice():
    dense, norm = nn.Dense(4), linen_norm()
    block = nn.Sequential([nn.Dense(4), linen_norm()])
    model, variables, x = initialized(
        [dense, norm, nn.relu, dense, linen_norm(), nn.relu, block, nn.relu, block], 8, 4
    )
    folded, fewer, report = fold_linen(model, variables)
    assert lines(report) == [
        "layers_1 BatchNorm: stays: layers_0 Dense, or a parameter of it, is used 2 times, "
        "precedes layers_2 relu",
        "layers_4 BatchNorm: stays: layers_3 Dense, or a parameter of it, is used 2 times, "
        "precedes layers_5 relu",
        "layers_6/layers_1 BatchNorm: folded into layers_6/layers_0 Dense",
    ]
    same(run(folded, fewer, x), run(model, variables, x))


LEFT = {
    "not a layer": ([nn.relu, linen_norm(), nn.relu], "follows layers_0 relu"),
    "first and last": ([linen_norm()], "is the first layer, is the last layer"),
    "padding": ([linen_norm(), nn.Conv(4, (3,))], "is the first layer, precedes layers_1 Conv"),
    "axis": ([nn.Dense(4), linen_norm(axis=1)], "has axis=1, but the layers beside it"),
    "local": ([nn.ConvLocal(4, (3,)), linen_norm()], "follows layers_0 ConvLocal"),
    "own product": (
        [nn.Dense(4, dot_general=jax.lax.dot_general), linen_norm()],
        "layers_0 Dense sets dot_general",
    ),
    "wider result": (
        [nn.Dense(4, dtype=jnp.bfloat16), linen_norm()],
        "follows layers_0 Dense in bfloat16, but returns float32",
    ),
    "narrower result": (
        [nn.Dense(4), linen_norm(dtype=jnp.bfloat16)],
        "follows layers_0 Dense in float32, but returns bfloat16",
    ),
    "coarse product": (
        [linen_norm(), nn.Dense(4, dtype=jnp.bfloat16)],
        "precedes layers_1 Dense in bfloat16, too few digits",
    ),
    "wider input": (
        [linen_norm(dtype=jnp.complex64), nn.Dense(4)],
        "precedes layers_1 Dense in float32, but returns complex64",
    ),
    "used twice": ([nn.Dense(4), n := linen_norm(), nn.relu, n], "stays: is used 2 times"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_stays_and_why(case, lenient):
    layers, why = LEFT[case]
    model, variables, x = initialized(layers, 3, 4, 4)
    folded, fewer, report = fold_linen(model, variables)
    assert why in str(report)
    assert len(report.stays) == len(report) > 0
    jax.tree.map(np.testing.assert_array_equal, fewer, variables)
    np.testing.assert_array_equal(run(folded, fewer, x), run(model, variables, x))


OWN = {
    "dot_general": (nn.Dense, nnx.Linear),
    "dot_general_cls": (nn.Dense,),
    "conv_general_dilated": (nn.Conv, nnx.Conv),
    "conv_general_dilated_cls": (nn.Conv,),
    "preferred_element_type": (nn.ConvTranspose, nnx.Linear, nnx.Conv, nnx.ConvTranspose),
    "promote_dtype": LINEAR,
}


@pytest.mark.parametrize(
    ("name", "kind"), [(n, kind) for n, kinds in OWN.items() for kind in kinds]
)
def test_a_layer_that_may_compute_something_else_stays(name, kind):
    """What another product than flax's makes of a kernel is not known, nor its dtype."""
    if name not in inspect.signature(kind.__init__).parameters:
        pytest.skip(f"{kind.__name__} of flax {flax.__version__} has no {name}")
    own = jnp.bfloat16 if name == "preferred_element_type" else lambda *values, **options: None
    window = () if kind in DENSE else ((3,),)
    if issubclass(kind, nn.Module):
        layer, norm = kind(4, *window, **{name: own}), linen_norm()
    else:
        layer = kind(4, 4, *window, **{name: own}, rngs=RNGS)
        norm = our_nnx.BatchNorm(4, rngs=RNGS)
    values = {"kernel": jnp.ones((3, 4, 4)), "mean": jnp.ones(4), "var": jnp.ones(4)}
    folding = fold_chain([ChainLayer("layer", layer, values), ChainLayer("norm", norm, values)])
    assert not folding.gone
    assert f"layer {kind.__name__} sets {name}" in folding.results[0].why_not


def test_two_in_a_row():
    model, variables, x = initialized([nn.Dense(4), linen_norm(), linen_norm()], 8, 4)
    folded, fewer, report = fold_linen(model, variables)
    assert [result.into for result in report] == ["layers_0 Dense"] * 2
    same(run(folded, fewer, x), run(model, variables, x))


def test_a_list_of_axes():
    model, variables, x = initialized([nn.Dense(4), linen_norm(axis=(-1,))], 3, 4)
    folded, fewer, _ = fold_linen(model, variables)
    assert "batch_stats" not in fewer
    same(run(folded, fewer, x), run(model, variables, x))


def test_half_precision_throughout(lenient):
    half = {"dtype": jnp.bfloat16}
    model, variables, x = initialized([nn.Dense(64, **half), linen_norm(**half)], 32, 16)
    folded, fewer, report = fold_linen(model, variables)
    y, whole = run(folded, fewer, x), run(model, variables, x)
    assert not report.stays
    assert y.dtype == whole.dtype == jnp.bfloat16
    # Rounded in both: the product and the result; in one: z, or the kernel and the bias.
    y, whole = (np.asarray(v, np.float64) for v in (y, whole))
    assert abs(y - whole).max() <= 8 * 2.0**-9 * abs(whole).max()


def test_linen_mistakes():
    with pytest.raises(
        TypeError, match=re.escape("module is a Dense, and the order of its layers is not known")
    ):
        fold_linen(nn.Dense(3), {})
    model, variables, _ = initialized([nn.Dense(4), linen_norm()], 3, 4)
    with pytest.raises(ValueError, match="variables lack batch_stats/layers_1/mean"):
        fold_linen(model, {"params": variables["params"]})
    variables["batch_stats"]["layers_1"]["mean"] = jnp.ones(1)
    with pytest.raises(ValueError, match=re.escape("state.mean has shape (1,)")):
        fold_linen(model, variables)


# nnx


class Model(nnx.Module):
    """A Sequential with all that is folded, one in a dict, and a batch norm of its own."""

    def __init__(self, batch_norm):
        norm = lambda features, **options: batch_norm(features, rngs=RNGS, **options)  # noqa: E731
        self.body = nnx.Sequential(
            nnx.Conv(4, 8, (3, 3), use_bias=False, feature_group_count=2, rngs=RNGS),
            norm(8),
            nnx.relu,
            nnx.ConvTranspose(8, 6, (2, 2), strides=2, transpose_kernel=True, rngs=RNGS),
            norm(6, use_scale=False, epsilon=0.1),
        )
        self.heads = nnx.Dict(
            a=nnx.Sequential(norm(6), nnx.Linear(6, 5, rngs=RNGS), norm(5, use_bias=False))
        )
        self.norm = norm(6)

    def __call__(self, x):
        return self.heads["a"](nnx.relu(self.norm(self.body(x))))


@pytest.mark.parametrize("batch_norm", [our_nnx.BatchNorm, nnx.BatchNorm])
def test_nnx(batch_norm, lenient):
    model, x = Model(batch_norm), inputs(4, 6, 5, 4)
    nnx.update(model, shaken(nnx.state(model)))
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    y = model(x)
    folded, report = fold_nnx(model)
    assert sorted(lines(report)) == [
        "body.layers.1 BatchNorm: folded into body.layers.0 Conv",
        "body.layers.4 BatchNorm: folded into body.layers.3 ConvTranspose",
        "heads.a.layers.0 BatchNorm: folded into heads.a.layers.1 Linear",
        "heads.a.layers.2 BatchNorm: folded into heads.a.layers.1 Linear",
        "norm BatchNorm: stays: is not in a Sequential; to find the layers beside it, call "
        "fold_nnx(model, x)",
    ]
    same(folded(x), y)
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    np.testing.assert_array_equal(model(x), y)
    assert model.body.layers[0].bias is None
    assert folded.body.layers[1] is identity
    graph, state = nnx.split(folded)  # still a module like any other
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), folded(x))


def used_twice():
    """Two layers, a parameter and a block that a model uses twice."""
    dense, tied = nnx.Linear(4, 4, rngs=RNGS), nnx.Linear(4, 4, rngs=RNGS)
    other = nnx.Linear(4, 4, rngs=RNGS)
    other.kernel = tied.kernel
    norms = [our_nnx.BatchNorm(4, rngs=RNGS) for _ in range(4)]
    block = nnx.Sequential(nnx.Linear(4, 4, rngs=RNGS), norms[3])
    model = nnx.Sequential(
        *(dense, norms[0], nnx.relu, dense, norms[1], nnx.relu),
        *(tied, norms[2], nnx.relu, other, block, nnx.relu, block),
    )
    nnx.update(model, shaken(nnx.state(model)))
    model.eval()
    return model


def test_nnx_used_twice(graph_mode):
    model = used_twice()
    folded, report = fold_nnx(model)
    assert [result.into for result in report] == [None, None, None, "layers.10.layers.0 Linear"]
    assert all("used 2 times" in result.why_not for result in report.stays)
    same(folded(inputs(8, 4)), model(inputs(8, 4)))


def test_nnx_used_twice_in_tree_mode(tree_mode):
    with set_modes(graph_mode=True):
        model = used_twice()
    for given in (), (inputs(8, 4),):
        folded, report = fold_nnx(model, *given)
        with set_modes(graph_mode=True):
            assert report == fold_nnx(model, *given)[1]
        same(folded(inputs(8, 4)), model(inputs(8, 4)))


def test_a_model_in_training_is_folded_for_inference():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=RNGS), our_nnx.BatchNorm(4, rngs=RNGS))
    model(inputs(8, 4))
    folded, _ = fold_nnx(model)
    model.eval()
    same(folded(inputs(8, 4)), model(inputs(8, 4)))


def test_nnx_mistakes():
    with pytest.raises(TypeError, match="model is a list"):
        fold_nnx([])
    assert str(fold_nnx(nnx.Sequential(nnx.relu))[1]) == "no batch norm"


# A deep network


def test_twenty_layers_without_a_batch_norm():
    model, variables = deep_linen(layers=20, features=4)
    variables, x = shaken(variables), inputs(2, 8, 8, 4)
    folded, fewer, report = fold_linen(model, variables)
    assert len(report) == 20
    assert not report.stays
    assert list(fewer) == ["params"]

    def operations(module, variables):
        text = jax.jit(module.apply).lower(variables, x).as_text()
        names = "convolution", "call @normalized", "rsqrt", "multiply"
        return [len(re.findall(name, text)) for name in names]

    assert operations(model, variables)[:2] == [20, 20]
    assert operations(folded, fewer) == [20, 0, 0, 0]
    y, whole = (np.asarray(run(m, v, x), float) for m, v in ((folded, fewer), (model, variables)))
    # Each layer adds the bar to the errors of the one before.
    assert abs(y - whole).max() <= 2 * 20 * BAR * abs(whole).max()
