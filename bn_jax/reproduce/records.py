"""What is kept of a run of claims: one file per claim, which is made again only when it must be.

A record belongs to the code that made it: the files of this folder that measure, the claim's own,
and the core. If any of them changes, the claim is measured again; if only comments, docstrings, the
claim's texts, or how it is judged and drawn have changed, it is not.
"""

import ast
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import bn_jax
from bn_jax.files import write_whole
from bn_jax.reproduce.claim import Claim, Results

PACKAGE = Path(bn_jax.__file__).parent
MEASURING = ("core", "reproduce/network.py", "reproduce/training.py", "reproduce/study.py")
MEASURING += (
    "train/batches.py",
    "train/step.py",
    "train/models.py",
    "train/convolution.py",
    "layers",
)

NEEDED = {"seeds", "quick", "date", "seconds", "versions", "results"}
"""What a record has beside its fingerprint."""


def fingerprint(claim: Claim, seeds: int, quick: bool) -> str:
    """Of all that a claim's results depend on, but for the versions of libraries."""
    files = []
    for name in MEASURING:
        path = PACKAGE / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256(f"{claim.name} {seeds} {quick}".encode())
    later = frozenset({claim.judge.__name__, claim.draw.__name__, "claim"})
    own = Path(claim.measure.__code__.co_filename).read_bytes()
    digest.update(code(own, later).encode())
    for file in files:
        digest.update(code(file.read_bytes()).encode())
    return digest.hexdigest()


@functools.cache
def code(source: bytes, without: frozenset[str] = frozenset()) -> str:
    """A file of Python less its comments, its docstrings and what it defines by these names."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not names(node) & without]
    return ast.dump(WithoutDocstrings().visit(tree))


class WithoutDocstrings(ast.NodeTransformer):
    """Drops statements that are a mere constant."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """None for a docstring."""
        return None if isinstance(node.value, ast.Constant) else node


def names(node: ast.stmt) -> set[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {node.name} if isinstance(node, ast.FunctionDef) else set()


def finite(results: Any) -> Any:
    """Results with None for each number that is not finite, which JSON does not have."""
    if isinstance(results, dict):
        return {name: finite(value) for name, value in results.items()}
    if isinstance(results, list):
        return [finite(value) for value in results]
    return None if isinstance(results, float) and not math.isfinite(results) else results


def place(folder: Path, claim: Claim, seeds: int) -> Path:
    """The file of a claim's record."""
    return folder / f"{claim.name}-{seeds}-seeds.json"


def load(folder: Path, claim: Claim, seeds: int, quick: bool) -> dict[str, Any] | None:
    """A claim's record, if there is one of this code; None if it has to be made."""
    try:
        record = json.loads(place(folder, claim, seeds).read_text())
        valid = record["fingerprint"] == fingerprint(claim, seeds, quick)
        return record if valid and record.keys() >= NEEDED else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or half of one
        return None


def save(
    folder: Path, claim: Claim, seeds: int, quick: bool, results: Results, about: dict[str, Any]
) -> dict[str, Any]:
    """Write a claim's record, whole or not at all, and return it."""
    record = {
        "claim": claim.name,
        "seeds": seeds,
        "quick": quick,
        "fingerprint": fingerprint(claim, seeds, quick),
        **about,
        "results": finite(results),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(place(folder, claim, seeds), (json.dumps(record) + "\n").encode())
    return record
