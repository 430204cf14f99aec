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
    with pytest.raises(
        CheckpointError, match=r"is not a .safetensors file; load it with torch.load"
    ):
        read_file(path)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_pickle_by_another_name_is_refused(tmp_path, kind):
    path = tmp_path / "m.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="is a pickle in spite of its name"):
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


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_dtype_that_numpy_has_not_stops_only_who_asks_for_it(tmp_path, dtype):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m.safetensors"
    numpy.save_file(STATE | {"conv.weight": np.zeros(4, np.uint8)}, path)
    content = path.read_bytes()  # in the header, spaces may follow what it says
    path.write_bytes(content.replace(b'"U8"', f'"{dtype}"'.encode(), 1))
    header = path.read_bytes()
    size = int.from_bytes(content[:8], "little") + len(header) - len(content)
    path.write_bytes(size.to_bytes(8, "little") + header[8:])
    _, state, _ = from_torch(path, "bn")
    assert state.mean.tolist() == [0, 1, 2]
    names = {"bn": "BatchNorm_0", "conv": "Conv_0"}
    with pytest.raises(CheckpointError, match=f"conv.weight in .* is of dtype {dtype}, which"):
        from_torch_model(path, names)


def test_arrays_are_a_mapping_that_reads_when_asked(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m.safetensors"
    numpy.save_file(STATE, path)
    arrays = read_file(path)
    assert len(arrays) == 3
    assert set(arrays) == set(STATE)
    assert "bn.weight" not in arrays
    with pytest.raises(KeyError):
        arrays["bn.weight"]
    assert {key: value.tolist() for key, value in dict(arrays).items()} == {
        key: value.tolist() for key, value in STATE.items()
    }


def test_a_damaged_file_is_refused(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m.safetensors"
    numpy.save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cannot be read .*get another copy"):
        read_file(path)


def test_what_is_neither_is_not_called_a_pickle(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"\x05" * 64)
    with pytest.raises(CheckpointError, match=r"cannot be read .*get another copy"):
        read_file(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "m.safetensors")
