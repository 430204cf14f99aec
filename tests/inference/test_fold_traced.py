"""Models that are no Sequentials, without batch norms: found by tracing a call."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.layers.linen as our_linen
import bn_jax.layers.nnx as our_nnx
from bn_jax.inference.fold_models import fold_linen, fold_nnx
from tests.inference.test_fold_models import RNGS, inputs, lines, same, shaken

pytestmark = pytest.mark.usefixtures("lenient")
KINDS = [our_linen.BatchNorm, nn.BatchNorm]


# linen


class Block(nn.Module):
    """He et al.'s: the second norm's result is added to the input, projected if it must be."""

    features: int
    norm: type = our_linen.BatchNorm
    project: bool = False

    @nn.compact
    def __call__(self, x, train):
        norm = lambda **options: self.norm(use_running_average=not train, **options)  # noqa: E731
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), use_bias=False)(x)))
        y = norm(use_bias=False, epsilon=1e-2)(nn.Conv(self.features, (3, 3))(y))
        if self.project:
            x = norm(name="project_norm")(nn.Conv(self.features, (1, 1), name="project")(x))
        return nn.relu(x + y)


class Residual(nn.Module):
    """A stem whose result the first norm shares with the shortcut, blocks, and a head."""

    norm: type = our_linen.BatchNorm
    block: type = Block

    @nn.compact
    def __call__(self, x, train):
        norm = lambda **options: self.norm(use_running_average=not train, **options)  # noqa: E731
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = x + nn.relu(norm(name="shared")(x))
        x = self.block(4, self.norm)(x, train)
        x = self.block(6, self.norm, project=True)(x, train)
        x = norm(name="pooled")(x.mean((1, 2)))
        return nn.Dense(5, name="head", use_bias=False)(x)


def made(model, x, **options):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **options))
    return shaken(shapes)


FATES = [
    "shared BatchNorm: stays: follows stem Conv, whose result goes elsewhere too, precedes other "
    "operations",
    "Block_0/BatchNorm_0 BatchNorm: folded into Block_0/Conv_0 Conv",
    "Block_0/BatchNorm_1 BatchNorm: folded into Block_0/Conv_1 Conv",
    "Block_1/BatchNorm_0 BatchNorm: folded into Block_1/Conv_0 Conv",
    "Block_1/BatchNorm_1 BatchNorm: folded into Block_1/Conv_1 Conv",
    "Block_1/project_norm BatchNorm: folded into Block_1/project Conv",
    "pooled BatchNorm: folded into head Dense",
]


@pytest.mark.parametrize("norm", KINDS)
def test_a_residual_net_of_linen(norm):
    model, x = Residual(norm), inputs(2, 5, 6, 3)
    variables = made(model, x, train=False)
    before = jax.tree.map(np.asarray, variables)
    folded, fewer, report = fold_linen(model, variables, x, train=False)
    assert lines(report) == FATES
    assert list(fewer["batch_stats"]) == ["shared"]
    assert "bias" in fewer["params"]["Block_0"]["Conv_0"]
    assert "bias" in fewer["params"]["head"]
    whole = jax.jit(model.apply, static_argnames="train")(variables, x, train=False)
    apply = jax.jit(folded.apply, static_argnames="train")
    y = apply(fewer, x, train=False)
    # Six folded layers, each within the bar of its unfolded one, the next at a size of its own.
    assert abs(y - whole).max() <= 7 * 4e-6 * abs(whole).max()
    text = apply.lower(fewer, x, train=False).as_text()
    assert text.count("rsqrt") == 1
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_shapes_are_example_enough_and_checkpoints_do_not_hide():
    model = Residual(block=nn.remat(Block, static_argnums=2))
    x = jax.ShapeDtypeStruct((2, 5, 6, 3), jnp.float32)
    variables = made(model, inputs(2, 5, 6, 3), train=False)
    folded, fewer, report = fold_linen(model, variables, x, False)
    assert [line.replace("Checkpoint", "") for line in lines(report)] == FATES
    y = folded.apply(fewer, inputs(2, 5, 6, 3), False)
    whole = model.apply(variables, inputs(2, 5, 6, 3), False)
    assert abs(y - whole).max() <= 7 * 4e-6 * abs(whole).max()


class Twice(nn.Module):
    """A layer that is called twice, and one whose result is also returned."""

    @nn.compact
    def __call__(self, x):
        dense, norm = nn.Dense(4), our_linen.BatchNorm(use_running_average=True)
        x = norm(dense(x))
        x = our_linen.BatchNorm(use_running_average=True)(dense(x))
        seen = nn.Dense(4)(nn.relu(x))
        return our_linen.BatchNorm()(seen, True), seen


def test_what_is_used_elsewhere_stays():
    model, x = Twice(), inputs(3, 4)
    variables = made(model, x)
    folded, fewer, report = fold_linen(model, variables, x)
    assert len(report.stays) == len(report) == 3
    twice = "Dense_0 Dense, or a parameter of it, is used 2 times"
    assert report[0].why_not == f"{twice}, {twice}"
    assert report[1].why_not == f"{twice}, precedes other operations"
    assert "follows Dense_1 Dense, whose result goes elsewhere too" in lines(report)[2]
    jax.tree.map(np.testing.assert_array_equal, fewer, variables)
    for a, b in zip(folded.apply(fewer, x), model.apply(variables, x), strict=True):
        np.testing.assert_array_equal(a, b)


class Ring(nn.Module):
    """Two layers that follow each other in turn."""

    @nn.compact
    def __call__(self, x):
        norm, dense = our_linen.BatchNorm(use_running_average=True), nn.Dense(4, name="ring")
        x = nn.Dense(4, name="first")(x)
        return dense(norm(dense(norm(x))))


def test_layers_in_a_ring_stay():
    model, x = Ring(), inputs(3, 4)
    variables = made(model, x)
    folded, fewer, report = fold_linen(model, variables, x)
    assert [result.why_not for result in report] == ["is used 2 times"]
    np.testing.assert_array_equal(folded.apply(fewer, x), model.apply(variables, x))


class Scanned(nn.Module):
    """Three copies of dense and norm in one loop, their values stacked."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = our_linen.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
                return x, None

        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(Step, axes, split_rngs={"params": True}, length=3)()(x, None)[0]


def test_stacked_layers_stay():
    model, x = Scanned(), inputs(3, 4)
    variables = made(model, x)
    folded, fewer, report = fold_linen(model, variables, x)
    assert [result.why_not for result in report] == ["is used 3 times"]
    same(folded.apply(fewer, x), model.apply(variables, x))


def test_a_sequential_with_inputs_and_without_is_the_same():
    layers = [nn.Dense(4, use_bias=False), our_linen.BatchNorm(use_running_average=True), nn.relu]
    model, x = nn.Sequential(layers), inputs(3, 4)
    variables = made(model, x)
    a, fewer, first = fold_linen(model, variables)
    b, same_values, second = fold_linen(model, variables, x)
    assert lines(first) == lines(second)
    jax.tree.map(np.testing.assert_array_equal, fewer, same_values)
    np.testing.assert_array_equal(a.apply(fewer, x), b.apply(fewer, x))


def test_mistakes():
    with pytest.raises(TypeError, match="give an example of its input too, fold_linen"):
        fold_linen(Twice(), {})
    with pytest.raises(TypeError, match=r"module is a Sequential.* to fold_nnx"):
        fold_linen(nnx.Sequential(nnx.relu), {}, inputs(3, 4))
    model, x = Residual(), inputs(2, 5, 6, 3)
    with pytest.raises(ValueError, match=r"shared is called in training mode, .*, train=False"):
        fold_linen(model, made(model, x, train=False), x, train=True)


# nnx


class NnxBlock(nnx.Module):
    def __init__(self, batch_norm, inputs, features, rngs):
        norm = lambda **options: batch_norm(features, rngs=rngs, **options)  # noqa: E731
        self.conv1 = nnx.Conv(inputs, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = norm()
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.norm2 = norm(use_bias=False, epsilon=1e-2)
        self.project = nnx.Conv(inputs, features, (1, 1), rngs=rngs) if inputs != features else None
        self.projected = norm() if inputs != features else None

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y), use_running_average=True)
        x = x if self.project is None else self.projected(self.project(x))
        return nnx.relu(x + y)


class NnxResidual(nnx.Module):
    def __init__(self, batch_norm, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.shared = batch_norm(4, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(batch_norm, 4, 4, rngs), NnxBlock(batch_norm, 4, 6, rngs)])
        self.heads = nnx.Dict(
            norm=batch_norm(6, rngs=rngs), dense=nnx.Linear(6, 5, use_bias=False, rngs=rngs)
        )
        self.unused = batch_norm(2, rngs=rngs)

    def __call__(self, x, factor=1):
        x = self.stem(x)
        x = x + nnx.relu(self.shared(x))
        for block in self.blocks:
            x = block(x)
        return factor * self.heads["dense"](self.heads["norm"](x.mean((1, 2))))


@pytest.mark.parametrize("batch_norm", [our_nnx.BatchNorm, nnx.BatchNorm])
def test_a_residual_net_of_nnx(batch_norm):
    model, x = NnxResidual(batch_norm, RNGS), inputs(2, 5, 6, 3)
    nnx.update(model, shaken(nnx.state(model)))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    folded, report = fold_nnx(model, jax.ShapeDtypeStruct(x.shape, x.dtype), factor=2)
    assert sorted(lines(report)) == [
        "blocks.0.norm1 BatchNorm: folded into blocks.0.conv1 Conv",
        "blocks.0.norm2 BatchNorm: folded into blocks.0.conv2 Conv",
        "blocks.1.norm1 BatchNorm: folded into blocks.1.conv1 Conv",
        "blocks.1.norm2 BatchNorm: folded into blocks.1.conv2 Conv",
        "blocks.1.projected BatchNorm: folded into blocks.1.project Conv",
        "heads.norm BatchNorm: folded into heads.dense Linear",
        "shared BatchNorm: stays: follows stem Conv, whose result goes elsewhere too, precedes "
        "other operations",
        "unused BatchNorm: stays: follows other operations, precedes other operations",
    ]
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not model.shared.use_running_average  # its mode is as it was
    model.eval()
    folded.eval()
    whole = model(x)
    assert abs(folded(x) - whole).max() <= 7 * 4e-6 * abs(whole).max()
    assert isinstance(model.blocks[0].norm1, batch_norm)
    assert type(folded.stem) is nnx.Conv
    statistics = jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    assert len(statistics) == 4  # of shared and unused
    graph, state = nnx.split(folded)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), folded(x))


@pytest.mark.parametrize("arguments", [((False,), {}), ((), {"use_running_average": False})])
def test_a_call_to_train_is_refused(arguments):
    class Adapting(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(4, 4, rngs=RNGS)
            self.norm = our_nnx.BatchNorm(4, rngs=RNGS)

        def __call__(self, x):
            return self.norm(self.dense(x), *arguments[0], **arguments[1])

    with pytest.raises(ValueError, match="norm is called in training mode"):
        fold_nnx(Adapting(), inputs(3, 4))


def test_a_shared_parameter_of_nnx_stays(graph_mode):
    class Tied(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Linear(4, 4, rngs=RNGS) for _ in range(2))
            self.b.kernel = self.a.kernel
            self.c = nnx.Linear(4, 4, rngs=RNGS)
            self.norms = nnx.List([our_nnx.BatchNorm(4, rngs=RNGS) for _ in range(3)])

        def __call__(self, x):
            x = self.norms[1](self.b(self.norms[0](self.a(x))))
            return self.norms[2](self.c(x)) + self.c(-x)

    model, x = Tied(), inputs(3, 4)
    nnx.update(model, shaken(nnx.state(model)))
    folded, report = fold_nnx(model, x)
    assert len(report.stays) == 3
    assert "c Linear, or a parameter of it, is used 2 times" in report[2].why_not
    model.eval()
    folded.eval()
    np.testing.assert_array_equal(folded(x), model(x))
