"""Which files may be opened? safetensors: a header of names and shapes, then plain numbers.

torch.save, joblib and numpy's object arrays are pickles, programs that run when they are opened.
They are refused before a byte of them is interpreted.
"""

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from bn_jax.interop.checks import refusal

REMEDY = (
    "load it with torch.load(weights_only=True) and pass the state_dict, or save it as safetensors "
    "(safetensors.torch.save_file)"
)


def read_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by name. Needs the extra `interop`.

    Args:
        path: must end in .safetensors.

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
            f"reading {path} needs safetensors: pip install safetensors, or bn-jax[interop]"
        ) from error
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise refusal(str(path), f"cannot be read ({error})", "get another copy") from error
