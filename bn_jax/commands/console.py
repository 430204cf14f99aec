"""Where commands print."""

import logging

from rich.console import Console

stderr = Console(stderr=True)
stdout = Console()


def quiet_orbax() -> None:
    """Keep orbax from logging pages about errors that it also raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
