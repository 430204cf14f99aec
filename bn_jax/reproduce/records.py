"""What is kept of a run of claims: one file per claim, which is made again only when it must be.

A record belongs to the code that made it: the files of this folder that measure, the claim's own,
and the core. If any of them changes, the claim is measured again.
"""

import hashlib
import json
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
    files = [Path(claim.measure.__code__.co_filename)]
    for name in MEASURING:
        path = PACKAGE / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256(f"{claim.name} {seeds} {quick}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load(folder: Path, claim: Claim, seeds: int, quick: bool) -> dict[str, Any] | None:
    """A claim's record, if there is one of this code; None if it has to be made."""
    try:
        record = json.loads((folder / f"{claim.name}.json").read_text())
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
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{claim.name}.json", (json.dumps(record) + "\n").encode())
    return record
