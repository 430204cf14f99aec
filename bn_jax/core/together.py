"""Sums of several arrays in one pass over memory, and the broadcast whose transpose they are.

A batch norm needs sums in pairs: of d and |d|² for the moments, of g and g·d on the way back. XLA's
CPU compiler reads all of x for each, and cannot do better with a reduction over the leading axes,
which it adds up column by column, one number after the other, when there are several results. In
blocks it can: an axis is cut into a few, those are added to each other, all arrays in one loop of
vector instructions, and a fraction of the data is left for the sums as they were. The other
devices' compilers fuse sums by themselves.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bn_jax.core.axes import Axes, batch_axes, for_each_feature, spread


def add_together(arrays: Sequence[Array], axes: Axes) -> list[Array]:
    """The sum of each of some arrays of one shape, per feature."""
    return add_p.bind(*arrays, axes=axes)


def spread_together(values: Sequence[Array], x: Array, axes: Axes) -> list[Array]:
    """Each of some values per feature, at every place of x; transposed, the sums above."""
    # The values take x's type from here on, as their sums will have it: what shard_map knows to
    # differ from device to device, and what an explicit mesh spreads over them.
    dtype = values[0].dtype
    zero = jnp.zeros_like(x, dtype, shape=()) + for_each_feature(0, x, axes, dtype)
    return spread_p.bind(*(value + zero for value in values), x, axes=axes)


def add_apart(*arrays: Array, axes: Axes) -> list[Array]:
    """The sums, one by one."""
    return [add_over(array, batch_axes(array, axes)) for array in arrays]


def add_in_blocks(*arrays: Array, axes: Axes, cuttable: Sequence[int]) -> list[Array]:
    """The same, of what is left when the blocks of an axis are added to each other."""
    shape = arrays[0].shape
    for axis in cuttable:
        blocks = max(n for n in range(1, 17) if shape[axis] % n == 0)
        if blocks >= 4:
            cut = (*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
            arrays = lax.reduce(
                tuple(array.reshape(cut) for array in arrays),
                tuple(np.zeros((), array.dtype) for array in arrays),
                lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)),
                (axis,),
            )
            break
    return add_apart(*arrays, axes=axes)


def add_over(values: Array, axes: Axes) -> Array:
    """Sum over all axes at once, or over the inner ones first where XLA's CPU is careless.

    It adds up several axes one number after the other, which loses digits: always before jaxlib
    0.10, and of small arrays since. The barrier keeps XLA from making one sum of the two.
    """
    size = values.size if isinstance(values.size, int) else 0  # of a symbolic one: any
    careless = size < 2**13 or jax.__version_info__ < (0, 10)
    if careless and len(axes) > 1:
        values, axes = lax.optimization_barrier(jnp.sum(values, axes[1:])), axes[:1]
    return jnp.sum(values, axes)


def spread_apart(*values: Array, axes: Axes) -> list[Array]:
    """Each value at every place of the last."""
    x = values[-1]
    return [
        jnp.broadcast_to(spread(value, x, axes), x.shape, out_sharding=jax.typeof(x).sharding)
        for value in values[:-1]
    ]


def per_feature(x, axes):
    """The type of one value per feature, spread over devices as x is."""
    spec = [x.sharding.spec[axis] for axis in axes]
    shape = tuple(x.shape[axis] for axis in axes)
    return x.update(shape=shape, sharding=x.sharding.update(spec=spec))


def sums_of(*arrays, axes):
    """What the sums look like."""
    return [per_feature(array, axes) for array in arrays]


def places_of(*values, axes):
    """What the values look like at every place of the last."""
    *values, x = values
    return [value.update(shape=x.shape, sharding=x.sharding) for value in values]


def add_jvp(primals, tangents, *, axes):
    """Linear; the tangents are added one by one, which JAX transposes into broadcasts."""
    tangents = map(instantiate, tangents)
    return add_p.bind(*primals, axes=axes), add_apart(*tangents, axes=axes)


def spread_jvp(primals, tangents, *, axes):
    """Linear in the values; of x only the shape counts."""
    tangents = map(instantiate, tangents[:-1])
    return spread_p.bind(*primals, axes=axes), spread_p.bind(*tangents, primals[-1], axes=axes)


def spread_transpose(cotangents, *values, axes):
    """The sums, of those that are asked for."""
    asked = [ad.is_undefined_primal(value) for value in values[:-1]]
    pairs = zip(cotangents, asked, strict=True)
    sums = iter(add_p.bind(*(instantiate(c) for c, ask in pairs if ask), axes=axes))
    return [next(sums) if ask else None for ask in asked] + [None]


def lower_for_cpu(context, *arrays, axes):
    """In blocks, of an axis along which no values lie on another device, where that is certain.

    Where it is not, in a jit over several devices by a mesh that types don't tell of, a wrong guess
    would move all of x.
    """
    mesh = context.avals_in[0].sharding.mesh
    certain = is_local(context) or mesh.are_all_axes_explicit
    cuttable = local_axes(context, axes) if certain else []
    add = functools.partial(add_in_blocks, cuttable=cuttable)
    return mlir.lower_fun(add)(context, *arrays, axes=axes)


def local_axes(context, axes):
    """The axes to sum over along which no values lie on another device, as far as types tell.

    The leading one comes last, and only where no other device takes part: it is what a batch is
    spread by.
    """
    x = context.avals_in[0]
    leading = [axis for axis in range(x.ndim) if axis not in axes][:1]
    return inner_axes(x, axes) + leading * is_local(context)


def inner_axes(x, axes):
    """The axes to sum over of a type, but the leading one and those that its mesh spreads."""
    summed = [axis for axis in range(x.ndim) if axis not in axes]
    return [axis for axis in summed[1:] if x.sharding.spec[axis] is None]


def is_local(context):
    """Whether what is lowered runs on one device: all is there, or it is shard_map's or pmap's."""
    context = context.module_context.axis_context
    if hasattr(context, "num_devices"):
        return context.num_devices == 1
    mesh = getattr(context, "mesh", None)
    return mesh is None or context.manual_axes >= set(mesh.axis_names)


def instantiate(tangent):
    """A tangent as an array, also if it is zero."""
    return jnp.asarray(ad.instantiate_zeros(tangent))


def batched(primitive):
    """With an axis more in front: where axes are told apart, one more feature axis."""

    def rule(values, dims, **options):
        like, at = next(pair for pair in zip(values, dims, strict=True) if pair[1] is not None)

        def in_front(value, dim):
            if dim is not None:
                return jnp.moveaxis(value, dim, 0)
            sharding = jax.typeof(value).sharding
            spec = (jax.typeof(like).sharding.spec[at], *sharding.spec)
            shape = (like.shape[at], *value.shape)
            return jnp.broadcast_to(value, shape, out_sharding=sharding.update(spec=spec))

        values = map(in_front, values, dims)
        if "axes" in options:
            options["axes"] = (0, *(axis + 1 for axis in options["axes"]))
        results = primitive.bind(*values, **options)
        return results, [0] * len(results) if primitive.multiple_results else 0

    return rule


def eagerly(function):
    """Of arrays of numpy's, too."""
    return lambda *arrays, **options: function(*map(jnp.asarray, arrays), **options)


add_p, spread_p = Primitive("add_together"), Primitive("spread_together")
add_p.def_impl(eagerly(add_apart))
add_p.def_abstract_eval(sums_of)
ad.primitive_jvps[add_p] = add_jvp
mlir.register_lowering(add_p, mlir.lower_fun(add_apart))
mlir.register_lowering(add_p, lower_for_cpu, platform="cpu")
spread_p.def_impl(eagerly(spread_apart))
spread_p.def_abstract_eval(places_of)
ad.primitive_jvps[spread_p] = spread_jvp
ad.primitive_transposes[spread_p] = spread_transpose
mlir.register_lowering(spread_p, mlir.lower_fun(spread_apart))
for primitive in (add_p, spread_p):
    primitive.multiple_results = True
    batching.primitive_batchers[primitive] = batched(primitive)
