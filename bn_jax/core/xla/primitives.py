"""Operations that compilers see in their own way: the only file that uses JAX's internals.

Behaviour: JAX keeps whatever a derivative is multiplied by, here x - origin in float32, although
the backward pass could compute it again from x. A JAX primitive keeps its operands instead, and
each platform can compute it in its own way. Public JAX has no way to do both: `jax.checkpoint`
inside a derivative rule cannot be transposed under `jax_remat3`, and `jax.experimental.jet` knows
neither `lax.platform_dependent` nor `jax.custom_jvp`.
Seen on: jax 0.8.2 to 0.12, all devices.
Cost without: a layer keeps 2 to 4 times as much memory for the backward pass.
Canary: tests/core/xla/test_primitives.py, `test_jax_keeps_x_alone`.

If JAX's internals are not where this file expects them, each operation is its plain function, which
JAX differentiates: the same values, but more memory and fewer digits.
"""
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

with contextlib.suppress(ImportError):
    from jax.experimental import jet
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

Function = Callable[..., list[Array]]


def operation(
    name: str,
    plain: Function,
    type_of: Callable[..., list[Any]],
    *,
    on: Mapping[str, Function] | None = None,
    jvp: Callable[..., Any] | None = None,
    transpose: Callable[..., Any] | None = None,
) -> Function:
    """A function of arrays and static options, returning a list, that JAX sees as one operation.

    Args:
        name: as it appears in a jaxpr.
        plain: what it computes, in JAX's own operations.
        type_of: the types of the results, given those of the operands.
        on: what to compute instead on a platform ("cpu", "gpu", …), or on "all". Also gets `alone`,
            whether the program is known to run on a single device.
        jvp: (operands, tangents) -> (results, their tangents), where None is a tangent of zero.
        transpose: (cotangents, operands) -> the cotangents of those operands that are None, in
            which the operation is linear.
    """
    try:
        return primitive_of(name, plain, type_of, on or {}, jvp, transpose)
    except (AttributeError, NameError, TypeError):
        return plain


def primitive_of(name, plain, type_of, on, jvp, transpose):
    """The same, where JAX's internals are as expected."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    def eagerly(*arrays, **options):
        special = on.get("all") or on.get(jax.default_backend())
        arrays = [jnp.asarray(array) for array in arrays]
        return special(*arrays, alone=False, **options) if special else plain(*arrays, **options)

    def jvp_rule(operands, tangents, **options):
        tangents = [None if isinstance(dot, ad.Zero) else dot for dot in tangents]
        results, dots = jvp(operands, tangents, **options)
        zeros = (ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results)
        pairs = zip(zeros, dots, strict=True)
        return results, [zero if dot is None else dot for zero, dot in pairs]

    def transpose_rule(cotangents, *operands, **options):
        cotangents = [None if isinstance(c, ad.Zero) else c for c in cotangents]
        asked = [ad.is_undefined_primal(operand) for operand in operands]
        known = [None if ask else part for ask, part in zip(asked, operands, strict=True)]
        found = iter(transpose(cotangents, known, **options))
        return [next(found) if ask else None for ask in asked]

    primitive.def_impl(eagerly)
    primitive.def_abstract_eval(type_of)
    batching.primitive_batchers[primitive] = functools.partial(batched, primitive)
    if jvp:
        ad.primitive_jvps[primitive] = jvp_rule
    if transpose:
        ad.primitive_transposes[primitive] = transpose_rule
    jet.jet_rules[primitive] = lambda primals, series, **options: jet.jet(
        functools.partial(plain, **options), primals, series, factorial_scaled=False
    )
    mlir.register_lowering(primitive, mlir.lower_fun(plain))
    for platform, special in on.items():
        lower = functools.partial(lower_alone, special)
        mlir.register_lowering(primitive, lower, None if platform == "all" else platform)
    return primitive.bind


def lower_alone(function, context, *arrays, **options):
    """Lower a function that is told whether its program runs on a single device."""
    alone = runs_on_one_device(context)
    return mlir.lower_fun(functools.partial(function, alone=alone))(context, *arrays, **options)


def batched(primitive, values, dims, **options):
    """Apply to values with one more axis in front, which is one more axis of features."""
    like, at = next(pair for pair in zip(values, dims, strict=True) if pair[1] is not None)

    def in_front(value, dim):
        if dim is not None:
            return jnp.moveaxis(value, dim, 0)
        sharding = jax.typeof(value).sharding
        spec = (jax.typeof(like).sharding.spec[at], *sharding.spec)
        shape = (like.shape[at], *value.shape)
        return jnp.broadcast_to(value, shape, out_sharding=sharding.update(spec=spec))

    results = primitive.bind(*map(in_front, values, dims), **options)
    return results, [0] * len(results)


def runs_on_one_device(context: Any) -> bool:
    """Whether a program is lowered for one device, or for each device by shard_map or pmap."""
    place: Any = getattr(getattr(context, "module_context", None), "axis_context", None)
    if hasattr(place, "num_devices"):
        return place.num_devices == 1
    if hasattr(place, "manual_axes"):
        return place.manual_axes >= set(place.mesh.axis_names)
    return hasattr(place, "axis_env")  # pmap's, in older JAX
