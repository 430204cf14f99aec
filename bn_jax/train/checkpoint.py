"""Training states on disk, by orbax: written aside, then renamed, so that the last one is good."""

from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from bn_jax.train.processes import loss_of_company
from bn_jax.train.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another network, or cannot be written."""


class Checkpoints:
    """The checkpoints of one arm of a run, newest last; the newest two are kept.

    A context, which at its end waits for what is being written.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self.folder = folder.absolute()
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if jax.process_count() > 1 and loss_of_company(error):
            return  # what is being written waits for a process that is gone
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self.unwritable(error) from error
        finally:
            self.manager.close()

    def save(self, state: TrainState) -> None:
        """Write a state in the background; it counts once it is whole.

        Raises:
            CheckpointError: this one or the one before cannot be written, as on a full disk.
        """
        try:
            self.manager.save(int(state.step), args=ocp.args.StandardSave(to_tree(state)))
        except Exception as error:  # orbax names no class for what can be wrong with a folder
            raise self.unwritable(error) from error

    def unwritable(self, error: Exception) -> CheckpointError:
        """What to raise where orbax cannot write."""
        good = newest_checkpoint(self.folder)
        return CheckpointError(
            f"a checkpoint cannot be written to {self.folder} ({first_line(error)}); make room, "
            f"or choose another --run-dir; the last good one is {good or 'not there yet'}"
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint of an arm, or None.

    Read from the names alone, which orbax gives to what is whole: its manager would ask the other
    processes, of which one may be gone.
    """
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return folder / str(max(steps)) if steps else None


def load_newest(folder: Path, like: TrainState) -> TrainState:
    """The newest state of an arm, in the shape of another.

    Args:
        folder: of the arm's checkpoints.
        like: a state of the same network and optimizer.

    Raises:
        CheckpointError: there is none, or it does not fit.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        raise CheckpointError(f"{folder} holds no finished checkpoint; train again")
    # To the device that is in use here, which may be of another kind than the run's.
    here = jnp.zeros(()).sharding
    tree = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(to_tree, like),
    )
    try:
        with ocp.CheckpointManager(folder.absolute()) as manager:
            tree = manager.restore(int(newest.name), args=ocp.args.StandardRestore(tree))
    except Exception as error:  # orbax names no class for what can be wrong with a folder
        raise CheckpointError(
            f"the checkpoint {newest} cannot be read as this run's network "
            f"({type(error).__name__}: {first_line(error)}); is config.json its own? If the "
            "checkpoint is damaged, delete that folder: the one before it may be good"
        ) from error
    restored = TrainState(**tree)
    return restored._replace(key=jax.random.wrap_key_data(restored.key))


def to_tree(state: TrainState) -> dict[str, Any]:
    """The state as orbax stores it: by name, the key as plain numbers."""
    return state._replace(key=jax.random.key_data(state.key))._asdict()


def first_line(error: Exception) -> str:
    """The head of what may be a page of text."""
    return (str(error).strip() or "no message").splitlines()[0]
