"""Reads safetensors files, and refuses pickles.

A safetensors file holds a header of names and shapes, then plain numbers. Files of torch.save,
joblib and numpy's object arrays are pickles: programs that run when they are opened. They are
refused before a byte of them is interpreted.
"""

import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bn_jax.interop.checks import checkpoint_error

REMEDY = (
    "load it with torch.load(weights_only=True) and pass the state_dict, or save it as safetensors "
    "(safetensors.torch.save_file)"
)


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of an open safetensors file by name, each read when it is asked for.

    So one batch norm of a large file is read quickly, and a file with a quantized weight, which
    numpy cannot represent, still gives all its other arrays.

    Args:
        path: of the file, for messages.
        file: what `safetensors.safe_open` returned.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"bn.weight": np.ones(2)}, f"{folder}/model.safetensors")
    ...     read_file(f"{folder}/model.safetensors")["bn.weight"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, path: Path, file: Any):
        self.path, self.file = path, file
        self.names = tuple(file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        """One array.

        Raises:
            KeyError: the file has no array of this name.
            CheckpointError: numpy does not have the array's dtype.
        """
        if name not in self.names:
            raise KeyError(name)
        try:
            return self.file.get_tensor(name)
        except Exception as error:  # its type depends on the version of safetensors
            dtype = self.file.get_slice(name).get_dtype()
            raise checkpoint_error(
                f"{name} in {self.path}",
                f"is of dtype {dtype}, which numpy does not have ({error})",
                "convert it to float32 with the program that wrote it, and apply its scale if any",
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_file(path: str | os.PathLike[str]) -> Arrays:
    """Open a safetensors file, as a mapping from names to arrays. Needs the extra `interop`.

    Args:
        path: must end in .safetensors.

    Returns:
        A mapping that reads each array when it is asked for. dict(read_file(path)) reads all.

    Raises:
        CheckpointError: the name or the first bytes are not those of a safetensors file, or the
            file is damaged.
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.

    >>> read_file("model.pth")
    Traceback (most recent call last):
    bn_jax.interop.checks.CheckpointError: model.pth: is not a .safetensors file; ...
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise checkpoint_error(str(path), "is not a .safetensors file", REMEDY)
    with path.open("rb") as file:
        start = file.read(9)
    # torch.save writes a zip (PK); old versions wrote a bare pickle (0x80, then the protocol).
    # A safetensors file starts with the size of its header in 8 bytes, then an opening brace.
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise checkpoint_error(str(path), "is a pickle in spite of its name", REMEDY)
    try:
        safetensors: Any = importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs safetensors; install it with: pip install safetensors"
        ) from error
    try:
        return Arrays(path, safetensors.safe_open(path, framework="np"))
    except safetensors.SafetensorError as error:
        raise checkpoint_error(
            str(path), f"cannot be read ({error})", "get another copy of the file"
        ) from error
