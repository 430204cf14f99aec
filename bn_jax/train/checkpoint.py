"""Training states on disk, by orbax: written aside, then renamed, so that the last one is good."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from bn_jax.train.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another network."""


class Checkpoints:
    """The checkpoints of one arm of a run, newest last; the newest two are kept.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self.folder = folder.absolute()
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState) -> None:
        """Write a state in the background; it counts once it is whole."""
        self.manager.save(int(state.step), args=ocp.args.StandardSave(to_tree(state)))

    def finish(self) -> Path | None:
        """Wait for what is being written; the folder of the newest checkpoint, or None."""
        self.manager.wait_until_finished()
        newest = self.manager.latest_step()
        self.manager.close()
        return None if newest is None else self.folder / str(newest)


def load_newest(folder: Path, like: TrainState) -> TrainState:
    """The newest state of an arm, in the shape of another.

    Args:
        folder: of the arm's checkpoints.
        like: a state of the same network and optimizer.

    Raises:
        CheckpointError: there is none, or it does not fit.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} holds no checkpoints: no such folder")
    with ocp.CheckpointManager(folder.absolute()) as manager:
        newest = manager.latest_step()
        if newest is None:
            raise CheckpointError(f"{folder} holds no finished checkpoint; train again")
        try:
            shapes = ocp.args.StandardRestore(jax.eval_shape(to_tree, like))
            tree = manager.restore(newest, args=shapes)
        except Exception as error:  # orbax names no class for what can be wrong with a folder
            raise CheckpointError(
                f"the checkpoint {folder / str(newest)} cannot be read as this run's network "
                f"({type(error).__name__}: {first_line(error)}); is config.json its own?"
            ) from error
    restored = TrainState(**tree)
    return restored._replace(key=jax.random.wrap_key_data(restored.key))


def to_tree(state: TrainState) -> dict[str, Any]:
    """The state as orbax stores it: by name, the key as plain numbers."""
    return state._replace(key=jax.random.key_data(state.key))._asdict()


def first_line(error: Exception) -> str:
    """The head of what may be a page of text."""
    return (str(error).strip() or "no message").splitlines()[0]
