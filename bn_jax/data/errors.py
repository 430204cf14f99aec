"""The error for data that is missing, or is not what its name promises."""

from pathlib import Path


class DataError(ValueError):
    """Data is missing, damaged, or not what its name promises.

    The message says which file, what was found, what was expected, and what to do about it.
    """


def expand(folder: str | Path, name: str) -> Path:
    """Returns a folder's path with the home of a user in place of ``~``.

    Raises:
        DataError: there is no such user.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"{name}: found {folder}, expected a folder; there is no such user: name one"
        ) from error
