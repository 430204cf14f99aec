"""A whole torch model in our linen tower: the same logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.interop.checks import CheckpointError
from bn_jax.interop.torch_model import from_torch_model
from bn_jax.layers.linen import BatchNorm
from bn_jax.train.models import TowerClassifier
from tests.interop.follow import assert_close

FILTERS, BLOCKS, SIDE, CLASSES = 6, 2, 7, 4
SIZES = {"filters": FILTERS, "blocks": BLOCKS, "classes": CLASSES}
NAMES = {
    "conv": "Tower_0/NormalizedLayer_0/Conv_0",
    "bn": "Tower_0/NormalizedLayer_0/BatchNorm_0",
    "head.conv": "PolicyHead_0/NormalizedLayer_0/Conv_0",
    "head.bn": "PolicyHead_0/NormalizedLayer_0/BatchNorm_0",
    "head.fc": "PolicyHead_0/Dense_0",
}
for i in range(BLOCKS):
    NAMES |= {
        f"blocks.{i}.conv1": f"Tower_0/ResidualBlock_{i}/NormalizedLayer_0/Conv_0",
        f"blocks.{i}.bn1": f"Tower_0/ResidualBlock_{i}/NormalizedLayer_0/BatchNorm_0",
        f"blocks.{i}.conv2": f"Tower_0/ResidualBlock_{i}/Conv_0",
        f"blocks.{i}.bn2": f"Tower_0/ResidualBlock_{i}/BatchNorm_0",
    }
FLATTENED = {"head.fc": (2, SIDE, SIDE)}


def our_model(**settings):
    return TowerClassifier(**SIZES, normalization=functools.partial(BatchNorm, **settings))


def shapes_of(model):
    initialize = functools.partial(model.init, train=False)
    return jax.eval_shape(initialize, jax.random.key(0), jnp.ones((1, SIDE, SIDE)))


def random_state_dict():
    """What torch would have saved, of the right names and shapes."""
    random = np.random.default_rng(0)
    entries = {}
    outputs = {name: 2 if name.startswith("head") else FILTERS for name in NAMES}
    for name, size in outputs.items():
        if "bn" in name:
            entries |= {
                f"{name}.weight": random.normal(size=size),
                f"{name}.bias": random.normal(size=size),
                f"{name}.running_mean": random.normal(size=size),
                f"{name}.running_var": random.uniform(1, 2, size),
                f"{name}.num_batches_tracked": np.array(5),
            }
        elif "conv" in name:
            inputs, side = (1 if name == "conv" else FILTERS), (1 if name == "head.conv" else 3)
            entries[f"{name}.weight"] = random.normal(size=(size, inputs, side, side))
    entries["head.fc.weight"] = random.normal(size=(CLASSES, 2 * SIDE * SIDE))
    entries["head.fc.bias"] = random.normal(size=CLASSES)
    return {k: v.astype(np.float32) if v.dtype == float else v for k, v in entries.items()}


def convert(state_dict, names=NAMES, **arguments):
    arguments = {"flattened": FLATTENED, **arguments}
    return from_torch_model(state_dict, names, **arguments)


def test_structure_and_shapes_are_those_of_the_model():
    variables, settings = convert(random_state_dict())
    like = shapes_of(our_model(**settings))
    assert jax.tree.structure(variables) == jax.tree.structure(like)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, like)
    convert(random_state_dict(), like=like)


def test_kernels_are_transposed():
    state_dict = random_state_dict()
    variables, _ = convert(state_dict)
    kernel = variables["params"]["Tower_0"]["ResidualBlock_1"]["Conv_0"]["kernel"]
    weight = state_dict["blocks.1.conv2.weight"]
    for o, i, h, w in ((0, 1, 2, 0), (5, 3, 1, 2)):
        assert kernel[h, w, i, o] == weight[o, i, h, w]
    dense = variables["params"]["PolicyHead_0"]["Dense_0"]["kernel"].reshape(SIDE, SIDE, 2, -1)
    fc = state_dict["head.fc.weight"].reshape(-1, 2, SIDE, SIDE)
    assert dense[3, 4, 1, 2] == fc[2, 1, 3, 4]


def without(key):
    return {k: v for k, v in random_state_dict().items() if k != key}


@pytest.mark.parametrize(("attempt", "message"), [
    (lambda like: convert(without("head.conv.weight"), like=like),
     "head.conv: is missing among .*are torch's names of layers"),
    (lambda like: convert(without("head.fc.bias"), like=like),
     "'params/PolicyHead_0/Dense_0/bias': has no value"),
    (lambda like: convert(without("bn.running_var"), like=like), "bn.running_var: is missing"),
    (lambda like: convert(without("bn.running_mean"), like=like), "'bn.num_batches_tracked'"),
    (lambda like: convert(random_state_dict() | {"extra.weight": np.ones((2, 2))}),
     "extra.weight: is not named"),
    (lambda like: convert(random_state_dict() | {"conv.alpha": np.ones(2)}),
     "'conv.alpha': is not an entry"),
    (lambda like: convert(random_state_dict() | {"conv.weight": np.ones(2)}),
     r"conv.weight: has shape \(2,\); a linear layer has two axes"),
    (lambda like: convert(random_state_dict() | {"conv.weight": np.ones((6, 1, 5, 5))}, like=like),
     r"Conv_0/kernel: has shape \(5, 5, 1, 6\), but the model's \(3, 3, 1, 6\)"),
    (lambda like: convert(random_state_dict() | {"head.fc.bias": np.ones(5)}),
     r"head.fc.bias: has shape \(5,\)"),
    (lambda like: convert(random_state_dict() | {"head.fc.bias": np.array([None] * 4)}),
     "head.fc.bias: is ndarray of dtype object"),
    (lambda like: convert(random_state_dict(), NAMES | {"conv": NAMES["head.conv"]}),
     "is the name of several layers"),
    (lambda like: convert(random_state_dict(), flattened={"head.fc": (3, SIDE, SIDE)}),
     r"flattened=\(3, 7, 7\) must be"),
    (lambda like: convert(random_state_dict(), flattened={"fc": (2, SIDE, SIDE)}),
     "fc: is missing among"),
    (lambda like: convert(random_state_dict(), like=shapes_of(our_model())),
     "has no place in the model; check names, or count=False"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(attempt, message):
    _, settings = convert(random_state_dict())
    with pytest.raises(CheckpointError, match=message):
        attempt(shapes_of(our_model(**settings)))


def torch_twin():
    """The tower, as one would write it in torch."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def convolution(inputs, outputs, side=3):
        return nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = convolution(FILTERS, FILTERS), nn.BatchNorm2d(FILTERS)
            self.conv2, self.bn2 = convolution(FILTERS, FILTERS), nn.BatchNorm2d(FILTERS)

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(x + self.bn2(self.conv2(y)))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = convolution(FILTERS, 2, 1), nn.BatchNorm2d(2)
            self.fc = nn.Linear(2 * SIDE * SIDE, CLASSES)

        def forward(self, x):
            return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = convolution(1, FILTERS), nn.BatchNorm2d(FILTERS)
            self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
            self.head = Head()

        def forward(self, images):
            x = torch.relu(self.bn(self.conv(images[:, None])))
            return self.head(self.blocks(x))

    torch.manual_seed(0)
    return torch, Twin()


@pytest.mark.peer
@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("steps", [0, 8])
def test_the_same_logits_as_torch(tmp_path, steps, by_file):
    torch, twin = torch_twin()
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.normal(1, 2, (16, SIDE, SIDE)).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, CLASSES, 16))
    optimizer = torch.optim.SGD(twin.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(images), labels).backward()
        optimizer.step()
    source = twin.state_dict()
    if by_file:
        save = pytest.importorskip("safetensors.torch")
        source = tmp_path / "twin.safetensors"
        save.save_file(twin.state_dict(), source)
    variables, settings = convert(source)
    model = our_model(**settings)
    x = jnp.asarray(images.numpy())
    with torch.no_grad():
        twin.eval()
        assert_close(model.apply(variables, x, train=False), twin(images).numpy())
        twin.train()
        logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        assert_close(logits, twin(images).numpy())
        twin.eval()
        assert_close(model.apply(variables | updates, x, train=False), twin(images).numpy())
    state = updates["batch_stats"]["Tower_0"]["ResidualBlock_0"]["BatchNorm_0"]
    assert_close(state["var"], twin.blocks[0].bn2.running_var.numpy())
    assert state["count"].tolist() == [steps + 1] * FILTERS
