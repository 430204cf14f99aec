"""Meshes of several devices, where there are several: the CPU has eight, a lone GPU one."""

import math

import jax
import pytest


def need(devices):
    """Skip a test on a machine whose accelerators are too few."""
    if jax.default_backend() != "cpu" and jax.device_count() < devices:
        pytest.skip(f"needs {devices} devices")


def make_mesh(shape, names, axis_types):
    """JAX's, or a skipped test."""
    need(math.prod(shape))
    return jax.make_mesh(shape, names, axis_types=axis_types)


def pmap(function, *names, **options):
    """JAX's, or a skipped test."""
    mapped = jax.pmap(function, *names, **options)

    def run(*arguments):
        need(len(jax.tree.leaves(arguments)[0]))
        return mapped(*arguments)

    return run
