"""Writes the committed report, bn_jax/reproduce/report, in a checkout.

After a full run, from its results:

    python -m bn_jax.reproduce.publish runs/reproduce/results.json

After a change to a claim's texts, bands or figure, anew from what is committed:

    python -m bn_jax.reproduce.publish
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bn_jax.reproduce.claims import CLAIMS
from bn_jax.reproduce.pace import REPORT
from bn_jax.reproduce.report import write_report


def publish(results: Path, folder: Path = REPORT) -> None:
    """Write the report that results make, without what is large: the page and the PNG figures.

    Raises:
        ValueError: not all claims are there, or they are of a quick run.
    """
    records = records_of(json.loads(results.read_text()))
    missing = CLAIMS.keys() - records.keys()
    quick = [name for name, record in records.items() if record["quick"]]
    if missing or quick:
        raise ValueError(f"{results}: not evidence; missing: {missing or 'none'}, quick: {quick}")
    with tempfile.TemporaryDirectory() as made:
        write_report(Path(made), list(CLAIMS.values()), records)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "figures").mkdir(parents=True)
        for part in ("report.md", "results.json", "figures/*.svg"):
            for path in Path(made).glob(part):
                shutil.copy(path, folder / path.relative_to(made))


def records_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is known of each claim, from results.json."""
    claims, runs = results["claims"], results["runs"]
    return {name: claims[name] | runs[name] for name in claims}


if __name__ == "__main__":
    publish(Path(sys.argv[1]) if len(sys.argv) > 1 else REPORT / "results.json")
