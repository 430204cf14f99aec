"""What goes wrong with data: it is missing, or it is not what its name promises."""

from pathlib import Path


class DataError(ValueError):
    """Data is missing, damaged, or not what its name promises.

    The message says which file, what was found, what was expected, and what to do about it.
    """


def unexpected(file: str, *, found: str, expected: str, remedy: str) -> DataError:
    """Builds a ``DataError`` that has all four parts of a useful message.

    Args:
        file: which file; a name, a path or a URL.
        found: what is there.
        expected: what should be there.
        remedy: what the reader can do about it.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> str(unexpected("labels", found="3 bytes", expected="8", remedy="get another copy"))
        'labels: found 3 bytes, expected 8; get another copy'
    """
    return DataError(f"{file}: found {found}, expected {expected}; {remedy}")


def expand(folder: str | Path, name: str) -> Path:
    """A folder, with the user's home in place of ``~``.

    Raises:
        DataError: it is the home of a user who does not exist.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise unexpected(
            name, found=str(folder), expected="a folder", remedy="there is no such user: name it"
        ) from error
