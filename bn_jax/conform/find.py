"""Finds a batch norm by name, `module:function`, and what it offers beside it."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from bn_jax.conform.contract import FUNCTIONS, Candidate, can_take, one_line


def find(target: str) -> Candidate:
    """Import a batch norm by name, `module:function` or `module:object` or `module`.

    Importing a module runs its code. The working directory is searched first, as by `python -m`.

    Raises:
        ValueError: there is none by that name; the message says what is there.
    """
    place, _, attribute = target.partition(":")
    if place.endswith(".py") or os.sep in place:
        raise ValueError(
            f"{target}: a path; name the module as in an import, from its folder, e.g. "
            f"{os.path.basename(place).removesuffix('.py')}:{attribute or 'batch_norm'}"
        )
    with working_directory_first():
        try:
            owner: Any = importlib.import_module(place)
            found = owner
            for name in filter(None, attribute.split(".")):
                found = there(found, name)
            return examine(found() if isinstance(found, type) else found, owner, target)
        except LookupError as error:
            raise ValueError(f"{target}: {error.args[0]}") from None
        except (Exception, SystemExit) as error:
            raise ValueError(f"{target}: cannot import it: {one_line(error)}") from error


def there(owner: Any, name: str) -> Any:
    """An attribute; a LookupError names those that there are."""
    try:
        return getattr(owner, name)
    except AttributeError:
        names = [n for n, v in vars(owner).items() if callable(v) and not n.startswith("_")]
        known = ", ".join(names) or "no functions"
        place = getattr(owner, "__name__", type(owner).__name__)
        raise LookupError(f"{place} has no {name}; it has {known}") from None


def examine(found: Any, owner: Any = None, name: str = "batch norm") -> Candidate:
    """A candidate from a function and the module it is in, or from what has a `batch_norm`.

    Raises:
        LookupError: it is neither, or takes other arguments.
    """
    main = getattr(found, "batch_norm", None)
    if main is not None:
        owner = found
    elif callable(found):
        main = found
    if not callable(main):
        raise LookupError("not a function, and has no function batch_norm")
    arguments, _ = FUNCTIONS["batch_norm"]
    if not can_take(main, arguments):
        raise LookupError(f"batch_norm must take ({', '.join(arguments)})")
    offered = {key: getattr(owner, key, None) for key in FUNCTIONS} | {"batch_norm": main}
    functions = {key: f for key, f in offered.items() if callable(f)}
    unbiased = getattr(owner, "unbiased", None)
    return Candidate(name, functions, unbiased if isinstance(unbiased, bool) else None)


@contextlib.contextmanager
def working_directory_first() -> Iterator[None]:
    """Import from the working directory, as scripts do and installed commands do not."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # what was imported may have taken it away
            sys.path.remove(here)
