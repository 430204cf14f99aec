"""A run's folder: what was asked, what happened, how it ended."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.loop import Evaluation
from bn_jax.train.processes import by_first, is_first


class RunFolderError(ValueError):
    """A run's folder cannot be made or read."""


class RunFolder:
    """The files of one run.

    `config.json` is written first; `metrics.jsonl` grows by a line per evaluation; `summary.json`
    and `curves.png` come at the end, whole or not at all; `checkpoints/ARM/STEP` as they fall due.

    Args:
        path: of the folder.
        writes: False leaves all of it but checkpoints to another process.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """A new folder for a run; of several processes, the first makes it, and alone writes.

        Raises:
            RunFolderError: it already holds something, cannot be made, or has an unfit name.
        """
        path = Path(by_first(lambda: str(cls.make(config))))
        return cls(path, writes=is_first())

    @classmethod
    def make(cls, config: TrainConfig) -> Path:
        """The path of a new folder, with the configuration in it."""
        path = config.run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
        folder = cls(path)
        if "[" in str(path.absolute()):
            raise RunFolderError(
                f"--run-dir {path}: must not have [ in its name, where orbax writes checkpoints "
                "that it cannot read; choose another folder"
            )
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            taken = any(path.iterdir())
        if taken:
            kept = "a run" if (path / "config.json").exists() else "other files"
            raise RunFolderError(
                f"--run-dir {path}: already holds {kept}; choose a new folder, or move it away"
            )
        folder.write("config.json", config.to_json())
        # Other processes may have been started elsewhere.
        return path if jax.process_count() == 1 else path.absolute()

    def read_config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            RunFolderError: there is none, or it is not one.
        """
        path = self.path / "config.json"
        try:
            return TrainConfig.from_json(path.read_text())
        except FileNotFoundError as error:
            raise RunFolderError(f"{self.path} is no run: it has no config.json") from error
        except (OSError, ValueError, TypeError) as error:
            raise RunFolderError(f"{path} cannot be read: {error}") from error

    def checkpoints(self, arm: Arm) -> Path:
        """The folder of an arm's checkpoints."""
        return self.path / "checkpoints" / arm

    def append(self, name: str, line: str) -> None:
        """Add a line to a file that grows."""
        if not self.writes:
            return
        path = self.path / name
        with writing(path), path.open("a") as file:
            file.write(line)

    def write(self, name: str, content: str | bytes) -> None:
        """A whole file, or none: written under another name, then renamed."""
        if not self.writes:
            return
        path, partial = self.path / name, self.path / f".{name}.partial"
        data = content.encode() if isinstance(content, str) else content
        with writing(path):
            try:
                with partial.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what could not be written and what to do, where the system says only why."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written ({error.strerror or error}); make room or give permission, "
            "or choose another --run-dir"
        ) from error


def metrics_line(arm: Arm, evaluation: Evaluation) -> str:
    """One line of `metrics.jsonl`; what is not finite is null, since JSON has no NaN."""
    return json.dumps({"arm": arm, **finite(evaluation._asdict())}) + "\n"


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for what is not finite."""
    bad = {k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return {key: None if key in bad else value for key, value in record.items()}
