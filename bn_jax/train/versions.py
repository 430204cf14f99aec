"""The versions and the hardware that a result belongs to."""

import contextlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bn_jax


def versions() -> dict[str, Any]:
    """The versions and hardware that a result belongs to."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {
        "bn-jax": bn_jax.__version__,
        "commit": commit(),
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": machine(),
        "cores": os.cpu_count(),
    }


def commit() -> str | None:
    """The commit that this package is a checkout of, with + if it was changed; None elsewhere."""
    git = ["git", "-C", str(Path(bn_jax.__file__).parent)]
    # A package that is installed inside of somebody's repository is none of its files.
    mine = [*git, "ls-files", "--error-unmatch", "__init__.py"]
    name = [*git, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        texts = [
            subprocess.check_output(c, text=True, stderr=subprocess.DEVNULL) for c in (mine, name)
        ]
        return texts[-1].strip()
    return None


def machine() -> str:
    """The device in words, and JAX's version."""
    (device,) = jnp.zeros(()).devices()  # where new arrays go, which --device may have changed
    kind = "" if device.device_kind.lower() == device.platform else f" ({device.device_kind})"
    return f"{device.platform.upper()}{kind}, jax {jax.__version__}"
