"""The file of vectors: inputs, expected results and tolerances.

vectors.json is made to be copied into other projects. Each vector names the functions that it
tests (`conform.contract.FUNCTIONS` lists their arguments), their inputs by name, what they are to
return, and by how much each value may be off, per feature. `lenient` is what a computation in
float32 needs that rounds the mean before it subtracts it. null stands for any value; "nan", "inf"
and "-inf" are strings, since JSON has no such numbers. `check` is

    close        the results are those expected
    convention   the results are one of those expected, which are named
    refusal      an error is raised, or the results are those expected
    finite       the results are finite

Inputs are exactly representable in `dtype`; expected values come from `conform.oracle`, in float64,
and have 12 digits. Write the file anew with: python -m bn_jax.conform.generate
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSION = 1
FILE = Path(__file__).with_name("vectors.json")
HALF = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Half-precision types, and the distance from 1 to the next number."""


class Vector(NamedTuple):
    """One case: what goes in, what is to come out."""

    name: str
    group: str
    calls: tuple[str, ...]
    dtype: str
    check: str
    inputs: dict[str, Any]
    expected: dict[str, Any]
    tolerance: dict[str, Any]
    lenient: dict[str, Any]


def dtype_of(name: str) -> np.dtype:
    """A numpy dtype, bfloat16 among them."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a dtype's numbers, in float32."""
    return x.astype(dtype_of(dtype)).astype(np.float32)


def plain(value: Any, digits: int | None = None) -> Any:
    """Lists and numbers for JSON: exact, or with so many digits."""
    if isinstance(value, Mapping):
        return {key: plain(item, digits) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.ndim:
        return [plain(item, digits) for item in value]
    if isinstance(value, list | tuple | range):
        return [plain(item, digits) for item in value]
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return int(value) if not isinstance(value, bool | np.bool_) else bool(value)
    if not np.isfinite(value):
        return str(float(value)) if digits is None else None
    return float(value) if digits is None else float(f"{float(value):.{digits}g}")


def unplain(value: Any) -> Any:
    """Arrays from lists and numbers of JSON; null becomes NaN."""
    if isinstance(value, dict):
        return {key: unplain(item) for key, item in value.items()}
    if isinstance(value, list):
        items = [unplain(item) for item in value]
        return np.array(items) if len({np.shape(item) for item in items}) < 2 else items
    return float(value) if isinstance(value, str) else np.nan if value is None else value


def as_json(vectors: Sequence[Vector]) -> str:
    """The file's text: an input or result a line, so that versions can be compared."""
    texts = []
    for v in vectors:
        entry = v._asdict() | {"inputs": plain(v.inputs)}
        entry |= {"expected": plain(v.expected, 12)}
        entry |= {name: plain(entry[name], 3) for name in ("tolerance", "lenient")}
        lines = [
            f"{json.dumps(key)}: {{\n"
            + ",\n".join(f"   {json.dumps(k)}: {compact(i)}" for k, i in item.items())
            + "\n  }"
            if isinstance(item, dict) and item
            else f"{json.dumps(key)}: {compact(item)}"
            for key, item in entry.items()
        ]
        texts.append(" {\n  " + ",\n  ".join(lines) + "\n }")
    head = f'{{"version": {VERSION}, "license": "Apache-2.0", "vectors": [\n'
    return head + ",\n".join(texts) + "\n]}\n"


def compact(value: Any) -> str:
    """A value as JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@functools.cache
def load() -> tuple[Vector, ...]:
    """The vectors of the file."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        Vector(**{**entry, "calls": tuple(entry["calls"])}, **arrays)
        for entry in content["vectors"]
        for arrays in [
            {k: unplain(entry.pop(k)) for k in ("inputs", "expected", "tolerance", "lenient")}
        ]
    )
