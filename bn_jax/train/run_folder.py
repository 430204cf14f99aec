"""The folder of a run: its settings, its evaluations, its summary and its checkpoints."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from bn_jax.files import locked, write_whole
from bn_jax.train.config import Arm, TrainConfig
from bn_jax.train.loop import Evaluation
from bn_jax.train.processes import by_first, is_first


class RunFolderError(ValueError):
    """A run's folder cannot be made or read."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    `config.json` is written first; `metrics.jsonl` grows by a line per evaluation; `summary.json`
    and `curves.png` come at the end; `checkpoints/ARM/STEP` from time to time. Except for
    `metrics.jsonl`, each is there whole or not at all. Of several processes, the first writes.
    """

    path: Path

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """A new folder for a run, made by the first process.

        Raises:
            RunFolderError: it already holds something, cannot be made, or has an unfit name.
        """
        return cls(Path(os.fsdecode(by_first(lambda: bytes(make_folder(config))))))

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from training here, until the block or this process ends."""
        taken = f"{self.path}: another process is training there; wait until it ends, or stop it"
        return locked(self.path, taken) if is_first() else nullcontext()

    def read_config(self) -> TrainConfig:
        """The run's configuration; a RunFolderError says if there is none, or it is not one."""
        path = self.path / "config.json"
        try:
            return TrainConfig.from_json(path.read_text())
        except FileNotFoundError as error:
            raise RunFolderError(
                f"{self.path} is no run: it has no config.json; give the folder of a run"
            ) from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RunFolderError(
                f"{path} cannot be read: {error}; put back the run's own file, or train again"
            ) from error

    def checkpoints(self, arm: Arm) -> Path:
        """The folder of an arm's checkpoints."""
        return self.path / "checkpoints" / arm

    def append(self, name: str, line: str) -> None:
        """Append a line to a file."""
        if is_first():
            with writing(self.path / name) as path, path.open("a") as file:
                file.write(line)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, whole or not at all."""
        if is_first():
            with writing(self.path / name) as path:
                write_whole(path, content.encode() if isinstance(content, str) else content)

    def read_metrics(self) -> dict[Arm, list[Evaluation]]:
        """The evaluations so far, in every process; an unfinished last line is ignored."""
        path, arms = self.path / "metrics.jsonl", dict[Arm, list[Evaluation]]()
        for line in by_first(lambda: path.read_bytes() if path.exists() else b"").splitlines():
            with suppress(ValueError, RecursionError, LookupError, TypeError):
                record = json.loads(line)
                fields: dict[str, Any] = {name: record[name] for name in Evaluation._fields}
                fields = {k: math.nan if v is None else v for k, v in fields.items()}
                arms.setdefault(record["arm"], []).append(Evaluation(**fields))
        return arms

    def read_seconds(self) -> float | None:
        """How long the run took, as its summary says; None without one."""
        with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
            return float(json.loads((self.path / "summary.json").read_bytes())["seconds"])
        return None

    def write_metrics(self, arms: Mapping[Arm, Sequence[Evaluation]], config: TrainConfig) -> None:
        """Replace all evaluations: a run that is resumed drops those after its checkpoint."""
        lines = [metrics_line(a, e, config.grid[e.cell]) for a, some in arms.items() for e in some]
        self.write("metrics.jsonl", "".join(lines))


def make_folder(config: TrainConfig) -> Path:
    """Make a run's folder, with its configuration in it; its name is the time if none is given."""
    path = config.run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    if unfit := set(str(path.absolute())) & set("[\\") - {os.sep}:
        raise RunFolderError(
            f"--run-dir {path}: must not have {unfit.pop()} in its name, where orbax could not "
            "read the checkpoints that it writes; choose another folder"
        )
    with writing(path):
        if config.run_dir is None:
            path = make_unique(path)
        path.mkdir(parents=True, exist_ok=True)
        try:
            if any(path.iterdir()):
                raise FileExistsError
            # Of two runs that find the same folder empty, only one can create this file.
            (path / "config.json").open("x").close()
        except FileExistsError as error:
            kept = "a run" if (path / "config.json").exists() else "other files"
            raise RunFolderError(
                f"--run-dir {path}: already holds {kept}; choose a new folder, or move it away"
            ) from error
    try:
        RunFolder(path).write("config.json", config.to_json())
    except BaseException:
        (path / "config.json").unlink()
        raise
    # Other processes may have another working directory.
    return path if jax.process_count() == 1 else path.absolute()


def make_unique(path: Path) -> Path:
    """Make a folder of that name or, if it is taken, of NAME-2, NAME-3 and so on."""
    for number in itertools.count(1):
        name = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            name.mkdir(parents=True)
            return name
    raise AssertionError


@contextmanager
def writing(path: Path, otherwise: str = ", or choose another --run-dir") -> Iterator[Path]:
    """Turn an error of the operating system into one that also says what to do."""
    try:
        yield path
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written ({error.strerror or error}); make room or give permission"
            + otherwise
        ) from error


def metrics_line(arm: Arm, evaluation: Evaluation, values: Mapping[str, float] = {}) -> str:
    """One line of `metrics.jsonl`, in a sweep with the values of its run; NaN is null in JSON."""
    numbers = evaluation._asdict().items()
    finite = {name: value if math.isfinite(value) else None for name, value in numbers}
    return json.dumps({"arm": arm, **values, **finite}) + "\n"
