"""torch's state_dict: what it means to us, and that torch agrees."""

import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.core.state import LOADED
from bn_jax.interop.torch import average_of, from_torch, to_torch
from tests.interop.follow import FEATURES, assert_same, batches, follow, targets, vectors


def state_dict(prefix="", affine=True, tracked=3):
    scale, bias, mean, var = vectors()
    entries = {"weight": scale, "bias": bias} if affine else {}
    entries |= {"running_mean": mean, "running_var": var}
    if tracked is not None:
        entries["num_batches_tracked"] = np.array(tracked, np.int64)
    return {prefix + key: value for key, value in entries.items()}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.03, None])
def test_a_round_trip_changes_nothing(affine, momentum):
    theirs = state_dict("net.bn1.", affine)
    ours = from_torch(theirs, "net.bn1", momentum=momentum, eps=1e-4)
    back, arguments = to_torch(*ours, "net.bn1")
    assert back.keys() == theirs.keys()
    for key, value in back.items():
        assert_same(value, theirs[key])
    assert arguments == {"eps": 1e-4, "momentum": momentum, "affine": affine}


def test_from_ours_and_back():
    params, state = bn.init(FEATURES, use_bias=False)
    _, state = bn.batch_norm(batches(1)[0], params, state, train=True)
    settings = {"average": bn.Ema(0.97), "epsilon": 1e-3, "unbiased": True}
    theirs, arguments = to_torch(params, state, settings)
    assert arguments == {"eps": 1e-3, "momentum": 0.03, "affine": True, "bias": False}
    again, kept, same = from_torch(theirs, momentum=arguments["momentum"], eps=arguments["eps"])
    assert again.bias is None
    assert same == settings
    for a, b in zip((again.scale, *kept), (params.scale, *state), strict=True):
        assert_same(a, b)


def test_a_layer_of_a_whole_model_is_named():
    theirs = state_dict("a.") | state_dict("ab.", tracked=9) | {"fc.weight": np.ones((2, 2))}
    assert from_torch(theirs, "ab")[1].count.tolist() == [9] * FEATURES
    assert from_torch(theirs, "a.")[1].count.tolist() == [3] * FEATURES


def test_without_a_count_it_is_the_one_given():
    theirs = state_dict(tracked=None)
    assert from_torch(theirs)[1].count.tolist() == [LOADED] * FEATURES
    assert from_torch(theirs, count=7)[1].count.tolist() == [7] * FEATURES


def test_a_bias_without_scale_gets_a_weight_of_one():
    params, state = bn.init(FEATURES, use_scale=False)
    settings = {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": True}
    theirs, arguments = to_torch(params, state, settings)
    assert theirs["weight"].tolist() == [1] * FEATURES
    assert arguments["affine"]
    assert "bias" not in arguments


def test_a_biased_variance_is_corrected_if_m_is_given():
    params, state = bn.init(FEATURES)
    settings = {"average": bn.Ema(0.9), "epsilon": 1e-5, "unbiased": False}
    copied, _ = to_torch(params, state, settings)
    corrected, _ = to_torch(params, state, settings, values_per_feature=32)
    assert_same(copied["running_var"], np.ones(FEATURES, np.float32))
    np.testing.assert_allclose(corrected["running_var"], 32 / 31, rtol=1e-7)
    agreed, _ = to_torch(params, state, settings | {"unbiased": True}, values_per_feature=32)
    assert_same(agreed["running_var"], np.ones(FEATURES, np.float32))


def torch_layer(steps, shape, **arguments):
    """A torch layer, trained for some steps of SGD."""
    torch = pytest.importorskip("torch")
    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    layer = kind(shape[1], **arguments)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1) if list(layer.parameters()) else None
    xs = batches(steps, shape, axis=1)
    for x, target in zip(xs, targets(xs), strict=True):
        loss = ((layer(torch.from_numpy(x)) - torch.from_numpy(target)) ** 2).mean()
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch, layer


def call(torch, layer, train):
    def apply(x):
        layer.train(train)
        with torch.no_grad():
            return layer(torch.from_numpy(x)).numpy()

    return apply


@pytest.mark.peer
@pytest.mark.parametrize("arguments", [
    {}, {"momentum": 0.3, "eps": 1e-2}, {"momentum": None}, {"affine": False},
])  # fmt: skip
@pytest.mark.parametrize("shape", [(32, FEATURES), (8, FEATURES, 4, 3)])
def test_ours_goes_on_where_torch_is(shape, arguments):
    torch, layer = torch_layer(5, shape, **arguments)
    words = {key: value for key, value in arguments.items() if key in ("momentum", "eps")}
    converted = from_torch(layer.state_dict(), **words)
    assert (converted[0].scale is None) == (not arguments.get("affine", True))
    state = follow(
        converted, call(torch, layer, False), call(torch, layer, True),
        batches(6, shape, seed=5, axis=1), axis=1,
        read=lambda: (layer.running_mean.numpy(), layer.running_var.numpy()),
    )  # fmt: skip
    assert state.count.tolist() == [layer.num_batches_tracked.item()] * FEATURES


@pytest.mark.peer
@pytest.mark.parametrize("momentum", [0.1, None])
def test_torch_goes_on_where_ours_is(momentum):
    torch, trained = torch_layer(5, (32, FEATURES), momentum=momentum)
    params, state, settings = from_torch(trained.state_dict(), momentum=momentum)
    x = jnp.asarray(batches(1, seed=9)[0])
    _, state = bn.batch_norm(x, params, state, train=True, **settings)
    theirs, arguments = to_torch(params, state, settings)
    layer = torch.nn.BatchNorm1d(FEATURES, **arguments)
    layer.load_state_dict({key: torch.from_numpy(value) for key, value in theirs.items()})
    evaluate, train = call(torch, layer, False), call(torch, layer, True)
    follow((params, state, settings), evaluate, train, batches(4, seed=5))


@pytest.mark.peer
def test_torch_tensors_round_trip_to_the_bit():
    _, layer = torch_layer(5, (32, FEATURES))
    back, _ = to_torch(*from_torch(layer.state_dict()))
    for key, value in layer.state_dict().items():
        assert_same(back[key], value.numpy())


@pytest.mark.peer
def test_bfloat16_tensors_are_exact():
    """Parameters as they are, statistics in float32, where small steps are not lost."""
    torch, layer = torch_layer(2, (32, FEATURES))
    params, state, _ = from_torch(layer.to(torch.bfloat16).state_dict())
    assert params.scale.dtype == jnp.bfloat16
    assert_same(state.mean, layer.running_mean.float().numpy())


@pytest.mark.peer
def test_a_lazy_conjugate_is_resolved():
    torch = pytest.importorskip("torch")
    mean = torch.tensor([1 + 2j]).conj()
    assert mean.is_conj()
    _, state, _ = from_torch({"running_mean": mean, "running_var": torch.ones(1)})
    assert state.mean.tolist() == [1 - 2j]


def test_a_momentum_of_numpy_is_a_plain_number():
    average = average_of(np.float32(0.25))
    assert average == bn.Ema(0.75)
    assert type(average.decay) is float


def test_double_precision_stays_where_it_is_enabled(x64):
    theirs = {k: v.astype(float) if v.ndim else v for k, v in state_dict().items()}
    theirs["running_mean"] += 1e-12
    back, _ = to_torch(*from_torch(theirs))
    for key, value in back.items():
        assert_same(value, theirs[key])
