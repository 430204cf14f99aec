"""What must be set before JAX is in use: the kind of device, and how many devices the CPU is."""

from contextlib import suppress

import jax

MOST = 256


def split_cpu(devices: int | None, processes: int = 1) -> None:
    """Split the CPU into several devices, unless JAX is in use already.

    Other kinds of device cannot be split; `make_sharding` says if there are too few.

    Args:
        devices: how many in all processes together; None for one in each.
        processes: how many processes the run has.

    Raises:
        ValueError: more than `MOST` in a process, which would take minutes to start.
    """
    each = (devices or 1) // processes
    if each > MOST:
        raise ValueError(f"--devices {devices}: must be at most {MOST} in a process")
    if each > 1:
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", each)


def choose_device(device: str) -> None:
    """Make JAX compute on the kind of device that was asked for, or refuse."""
    if device == "auto":
        return
    try:
        jax.config.update("jax_default_device", jax.local_devices(backend=device)[0])
    except RuntimeError as error:
        raise ValueError(
            f"--device {device}: JAX finds none here ({error}); install jax's build for it, or "
            "choose --device auto"
        ) from error
