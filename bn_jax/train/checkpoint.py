"""Checkpoints by orbax, each with a digest of its content, so that a flipped bit is noticed.

Orbax writes a checkpoint under another name and renames it, so that a folder whose name is a number
is complete. It holds the arrays of a `Progress` by name, and a record: the format, the run's
settings and the digest.
"""

import hashlib
import io
import json
import logging
import operator
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from bn_jax.train.processes import by_first, is_first
from bn_jax.train.progress import Progress

FORMAT = 2
"""Changes when what is stored does."""

Keep = Literal["newest", "best", "all"]
Arrays = dict[str, np.ndarray]
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another run, or cannot be written."""


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """Where the checkpoints of one arm of a run are written, and how long they are kept.

    A context, which at its end waits for what is being written. Of several processes the first
    writes, and does not need the others for it. A CheckpointError says what cannot be written.

    Args:
        folder: made if it is missing.
        settings: of the run and arm, as JSON has them; `load_newest` refuses others.
        since: the step from which the run goes on. A checkpoint of a later one was passed over, as
            it is damaged, and is renamed.
        keep: the newest two, these and the best, or all.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], since: int = -1, keep: Keep = "newest"
    ) -> None:
        self.folder, self.settings, self.manager = folder.absolute(), dict(settings), None
        if not is_first():
            return
        try:
            for path in finished(self.folder):
                if int(path.name) > since:
                    path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manager = open_folder(self.folder, keep)
        except Exception as error:
            raise CheckpointError(
                f"{self.folder} cannot be opened ({first_line(error)}); give permission, or move "
                "away what is damaged there"
            ) from error

    def __exit__(self, *_: object) -> None:
        if self.manager is not None:
            try:
                self.manager.wait_until_finished()
            except Exception as error:
                raise self.unwritable(error) from error
            finally:
                self.manager.close()

    def save(self, progress: Progress, accuracy: float | None = None) -> None:
        """Write in the background; a checkpoint counts once it is whole.

        The best one is found by its accuracy, if that is known. An error may be of this checkpoint
        or of the one before.
        """
        if self.manager is None or progress.step in self.manager.all_steps():
            return
        arrays = {name: np.asarray(array) for name, array in to_arrays(progress).items()}
        record = {"format": FORMAT, "settings": self.settings}
        record["digest"] = digest(record, arrays)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
        )
        metrics = None if accuracy is None else {"test_accuracy": accuracy}
        try:
            self.manager.save(progress.step, args=args, metrics=metrics)
        except Exception as error:  # orbax names no class for what can be wrong with a folder
            raise self.unwritable(error) from error

    def unwritable(self, error: Exception) -> CheckpointError:
        """What to raise where orbax cannot write."""
        good = newest_checkpoint(self.folder)
        return CheckpointError(
            f"a checkpoint cannot be written to {self.folder} ({first_line(error)}); make room, "
            f"or choose another --run-dir; the last good one is {good or 'not there yet'}"
        )


def open_folder(folder: Path, keep: Keep = "newest") -> ocp.CheckpointManager:
    """Orbax's view of an arm's checkpoints, for which process 0 does not wait for others."""
    accuracy, newest = operator.itemgetter("test_accuracy"), policies.LatestN(2)
    best = policies.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)
    policy = {
        "newest": newest,
        "best": policies.AnyPreservationPolicy([newest, best]),
        "all": policies.PreserveAll(),
    }[keep]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=accuracy if keep == "best" else None,  # without it, orbax stores none
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(0, active_processes={0}),
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def finished(folder: Path) -> list[Path]:
    """The finished checkpoints of an arm, oldest first; orbax gives them plain numbers as names."""
    found = [path for path in folder.glob("*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint of an arm, or None."""
    return next(reversed(finished(folder)), None)


def load_newest(
    folder: Path, like: Progress, settings: Mapping[str, Any], step: int | None = None
) -> Progress | None:
    """The newest sound progress of an arm, or None without any; the same in every process.

    A damaged checkpoint is passed over with a warning.

    Args:
        folder: of the arm's checkpoints.
        like: of the same network and optimizer; its shapes matter alone.
        settings: of the run and arm; a CheckpointError says if a sound checkpoint has others.
        step: to look at the checkpoint of this step alone; None for all.
    """
    paths = [path for path in finished(folder) if step in (None, int(path.name))]
    stored = by_first(lambda: read_newest(paths, jax.eval_shape(to_arrays, like), settings))
    if not stored:
        return None
    with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
        leaves = [jnp.asarray(arrays[name]) for name in named_leaves(like)]
    progress: Progress = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return with_key(progress, jax.random.wrap_key_data(progress.state.key))


def read_newest(
    paths: Sequence[Path], like: Mapping[str, Any], settings: Mapping[str, Any]
) -> bytes:
    """The arrays of the last sound checkpoint as an .npz file, or nothing."""
    for path in reversed(paths):
        try:
            arrays, record = read(path)
        except Exception as error:  # orbax names no class for what can be wrong with a file
            reason = f"{type(error).__name__}: {first_line(error)}"
            logger.warning("the checkpoint %s is damaged and passed over (%s)", path, reason)
            continue
        # The format before the settings, which may be other ones in another version. A setting that
        # is newer than the run is not in its record, and None in ours.
        theirs, known = record["settings"], record["format"] == FORMAT
        names = sorted(n for n in theirs | settings if theirs.get(n) != settings.get(n))
        if known and names:
            raise CheckpointError(
                f"the checkpoint {path} is of a run with other settings than config.json has "
                f"({', '.join(names)}); put back the run's own files, or train again"
            )
        shapes = [{name: (x.shape, x.dtype) for name, x in some.items()} for some in (arrays, like)]
        if not known or shapes[0] != shapes[1]:
            raise CheckpointError(
                f"the checkpoint {path} is of another version of bn_jax, which stores or builds "
                "this network otherwise; use that version, or train again"
            )
        stored = io.BytesIO()
        np.savez(stored, allow_pickle=False, **arrays)
        return stored.getvalue()
    return b""


def read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays and the record of a checkpoint; raises whatever unless they are sound."""
    items = ocp.args.Composite(state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
    with open_folder(path.parent) as manager:
        restored = manager.restore(int(path.name), args=items)
    arrays = {name: np.asarray(value) for name, value in restored.state.items()}
    record = restored.record
    if record.pop("digest") != digest(record, arrays):
        raise CheckpointError("it does not hold what was written")
    return arrays, record


def digest(record: Mapping[str, Any], arrays: Arrays) -> str:
    """A SHA-256 hash of all that a checkpoint holds."""
    sha = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def to_arrays(progress: Progress) -> dict[str, Any]:
    """The arrays of a progress by name; the key as plain numbers."""
    return named_leaves(with_key(progress, jax.random.key_data(progress.state.key)))


def named_leaves(progress: Progress) -> dict[str, Any]:
    """The leaves of a progress by name, such as "state.step"."""
    leaves = jax.tree.leaves_with_path(progress)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def with_key(progress: Progress, key: jax.Array) -> Progress:
    """The progress with another key."""
    return progress._replace(state=progress.state._replace(key=key))


def first_line(error: Exception) -> str:
    """The head of what may be a page of text."""
    return textwrap.shorten((str(error).strip() or "no message").splitlines()[0], 200)
