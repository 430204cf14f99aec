"""Which files may be opened? safetensors: a header of names and shapes, then plain numbers.

torch.save, joblib and numpy's object arrays are pickles, programs that run when they are opened.
They are refused before a byte of them is interpreted.
"""

import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bn_jax.interop.checks import refusal

REMEDY = (
    "load it with torch.load(weights_only=True) and pass the state_dict, or save it as safetensors "
    "(safetensors.torch.save_file)"
)


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of an open safetensors file, each read when it is asked for.

    So a file of many gigabytes gives one batch norm at once, and one with a quantized weight, which
    numpy cannot hold, gives all the others.

    Args:
        path: of the file, for messages.
        file: what safetensors opened.
    """

    def __init__(self, path: Path, file: Any):
        self.path, self.file = path, file
        self.names = tuple(file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        """One array.

        Raises:
            KeyError: the file has none of this name.
            CheckpointError: numpy has no such dtype.
        """
        if name not in self.names:
            raise KeyError(name)
        try:
            return self.file.get_tensor(name)
        except Exception as error:  # of several types, by the version of safetensors
            dtype = self.file.get_slice(name).get_dtype()
            raise refusal(
                f"{name} in {self.path}",
                f"is of dtype {dtype}, which numpy has not ({error})",
                "convert it to float32 by what wrote it, with its scale if it has one",
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_file(path: str | os.PathLike[str]) -> Arrays:
    """The arrays of a safetensors file, by name. Needs the extra `interop`.

    Args:
        path: must end in .safetensors.

    Returns:
        A mapping that reads each array when it is asked for; dict(read_file(path)) reads all.

    Raises:
        CheckpointError: the file is of another kind, by its name or its first bytes, or damaged.
        FileNotFoundError: there is none.
        ImportError: safetensors is not installed.

    >>> read_file("model.pth")
    Traceback (most recent call last):
    bn_jax.interop.checks.CheckpointError: model.pth: is no .safetensors file; ...
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise refusal(str(path), "is no .safetensors file", REMEDY)
    with path.open("rb") as file:
        start = file.read(9)
    # torch.save writes a zip (PK) or, as it once did, a bare pickle (0x80 and its protocol).
    # A safetensors file starts with its header's size in 8 bytes, of any value, and then a brace.
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise refusal(str(path), "is a pickle, whatever its name says", REMEDY)
    try:
        safetensors: Any = importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs safetensors; install it with: pip install safetensors"
        ) from error
    try:
        return Arrays(path, safetensors.safe_open(path, framework="np"))
    except safetensors.SafetensorError as error:
        raise refusal(str(path), f"cannot be read ({error})", "get another copy") from error
