"""Files: safetensors are read, pickles are not opened."""

import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.interop.checks import CheckpointError
from bn_jax.interop.files import read_file
from bn_jax.interop.torch import from_torch
from bn_jax.interop.torch_model import from_torch_model

STATE = {
    "bn.running_mean": np.arange(3, dtype=np.float32),
    "bn.running_var": np.ones(3, np.float32),
    "bn.num_batches_tracked": np.array(7, np.int64),
}


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.pkl", "m.bin", "m.ckpt", "m.npz", "m"])
@pytest.mark.parametrize("read", [read_file, from_torch, lambda path: from_torch_model(path, {})])
def test_other_files_are_refused_by_name(tmp_path, read, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"torch.load\(weights_only=True\).*safetensors"):
        read(path)


def test_the_name_decides_before_the_content(tmp_path):
    path = tmp_path / "m.npy"
    np.save(path, np.ones(3))
    with pytest.raises(CheckpointError, match=r"is no .safetensors file; load it with torch.load"):
        read_file(path)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_pickle_by_another_name_is_refused(tmp_path, kind):
    path = tmp_path / "m.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="is a pickle, whatever its name says"):
        read_file(path)


def test_a_safetensors_file_round_trips(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m.safetensors"
    numpy.save_file(STATE, path)
    _, state, _ = from_torch(path, "bn")
    assert state.mean.tolist() == [0, 1, 2]
    assert state.count.tolist() == [7, 7, 7]
    for key, value in read_file(str(path)).items():
        assert value.dtype == STATE[key].dtype


@pytest.mark.parametrize("size", [0x80, 0x4B50])
def test_a_header_whose_size_looks_like_a_pickle_is_read(tmp_path, size):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m.safetensors"
    numpy.save_file({"a": np.zeros(1, np.float32)}, path)
    content = path.read_bytes()
    old = int.from_bytes(content[:8], "little")
    assert old <= size
    header = content[8 : 8 + old].ljust(size)
    path.write_bytes(size.to_bytes(8, "little") + header + content[8 + old :])
    assert read_file(path)["a"].tolist() == [0]


def test_half_precision_is_read(tmp_path):
    flax = pytest.importorskip("safetensors.flax")
    path = tmp_path / "m.safetensors"
    flax.save_file({"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16)}, path)
    read = read_file(path)
    assert read["a"].dtype == jnp.bfloat16
    assert read["b"].dtype == np.float16


def test_a_damaged_file_is_refused(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m.safetensors"
    numpy.save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cannot be read .*get another copy"):
        read_file(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "m.safetensors")
