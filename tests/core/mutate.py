"""Break the package in many small ways, and see whether the tests notice.

    python tests/core/mutate.py             all of them, one per core at a time
    python tests/core/mutate.py ε merge     those whose name or file contains a word

Each mutation replaces one text in a temporary copy of the package, and the tests run on the copy:
first the file that should notice, then, if it does not, the others of its folder. A mutation that
survives is a test that is missing; one that is known to change nothing says why in EQUIVALENT.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One way to break one file, and the tests that should notice first.

    Outside of the core, both are named with their folder: "layers/linen.py", "layers/swap".
    """

    name: str
    file: str
    old: str
    new: str
    noticed_by: str


MUTATIONS = [
    # moments.py
    Mutation(
        "merge drops the variance between the parts",
        "moments.py",
        " + share_a * share_b * square(difference)",
        "",
        "monoid",
    ),
    Mutation(
        "merge swaps the shares of the variances",
        "moments.py",
        "share_a * a.var + share_b * b.var",
        "share_b * a.var + share_a * b.var",
        "monoid",
    ),
    Mutation(
        "merge steps from the smaller set",
        "moments.py",
        "share_b <= share_a,",
        "share_b > share_a,",
        "monoid",
    ),
    Mutation(
        "merge has the wrong sign of the step",
        "moments.py",
        "a.mean + share_b.astype",
        "a.mean - share_b.astype",
        "monoid",
    ),
    Mutation(
        "merge forgets one of the counts",
        "moments.py",
        "count = a.count + b.count",
        "count = a.count",
        "monoid",
    ),
    Mutation(
        "pool weighs all members alike",
        "moments.py",
        "total, squares = count.astype(mean.dtype) * mean, count * (var + square(mean))",
        "count = jnp.ones_like(count)\n"
        "    total, squares = count.astype(mean.dtype) * mean, count * (var + square(mean))",
        "monoid",
    ),
    Mutation(
        "pool drops the variance between members",
        "moments.py",
        "count * (var + square(mean))",
        "count * var",
        "monoid",
    ),
    Mutation(
        "pool takes a mean of sums instead of their sum",
        "moments.py",
        "    sums = add(Sums(total, squares, count, near.squares))\n",
        "    sums = Sums(total, squares, add(count), near.squares)\n",
        "monoid",
    ),
    Mutation(
        "batch norm pools by pmean",
        "replicas.py",
        "return lax.psum(values, axis_name)\n",
        "return lax.pmean(values, axis_name)\n",
        "state",
    ),
    Mutation(
        "the shared origin is a plain mean of the members'",
        "origin.py",
        "add((count.astype(origin.dtype) * origin, count))",
        "add((jnp.where(count > 0, origin, 0), jnp.sign(count)))",
        "accuracy",
    ),
    Mutation(
        "the origin of each member is its own",
        "origin.py",
        "return shared_origin(origin, for_each(count, x, axes), "
        "lambda parts: sum_over(parts, replicas))",
        "return origin",
        "state",
    ),
    Mutation(
        "the origin is zero",
        "origin.py",
        "origin = part_p.bind(x, axes=axes)",
        "origin = 0 * part_p.bind(x, axes=axes)",
        "accuracy",
    ),
    Mutation(
        "one step to the origin of weighted data",
        "origin.py",
        "origin = origin + mean(center(x, origin, axes))",
        "pass",
        "constant",
    ),
    Mutation(
        "padding is not dropped",
        "sums.py",
        "return values if padding is None else jnp.where(padding, jnp.zeros_like(values), values)",
        "return values",
        "state",
    ),
    Mutation(
        "all that is excluded is dropped, finite or not",
        "sums.py",
        "~(counts(weights) | jnp.isfinite(x))",
        "~jnp.broadcast_to(counts(weights), x.shape)",
        "state",
    ),
    Mutation(
        "excluded values are multiplied by zero, not left out",
        "sums.py",
        "jnp.where(kept, values, jnp.zeros_like(values))",
        "kept.astype(values.dtype) * values",
        "state",
    ),
    Mutation(
        "weights are not squared away: Σ w² d²",
        "sums.py",
        "weigh(square(kept), weights)",
        "weigh(weigh(square(kept), weights), weights)",
        "monoid",
    ),
    Mutation(
        "the count of a mask is the batch size",
        "sums.py",
        "parts.append(weights.astype(parts[1].dtype))",
        "parts.append(jnp.ones_like(weights, parts[1].dtype))",
        "monoid",
    ),
    Mutation(
        "the origin of weighed values is divided by the batch size",
        "sums.py",
        "return add_over(weights.astype(real_dtype(statistics_dtype(x.dtype))), "
        "batch_axes(x, axes))",
        "return batch_size(x, axes)",
        "monoid",
    ),
    Mutation(
        "sums over several axes are one sum",
        "together.py",
        "if careless and len(axes) > 1:",
        "if False:",
        "together",
    ),
    Mutation(
        "variance without the square of the mean's residual",
        "moments.py",
        "var = share(sums.square, count) - square(mean)",
        "var = share(sums.square, count)",
        "monoid",
    ),
    Mutation(
        "a known count of nothing is divided by",
        "sums.py",
        "max(whole, 1)",
        "whole",
        "monoid",
    ),
    Mutation(
        "the mean is not moved back",
        "moments.py",
        "mean=moments.mean + by",
        "mean=moments.mean",
        "monoid",
    ),
    Mutation(
        "a quotient of nothing is not guarded",
        "sums.py",
        "return lax.select(whole > 0, whole, jnp.ones_like(whole)).astype(part.dtype)",
        "return whole.astype(part.dtype)",
        "monoid",
    ),
    Mutation(
        "divisors may become reciprocals",
        "quotient.py",
        "return part / lax.select(part != part, part, whole)",
        "return part / whole",
        "constant",
    ),
    Mutation(
        "a GPU divides as it likes",
        "quotient.py",
        "mlir.lower_fun(divide_in_double,",
        "mlir.lower_fun(divide,",
        "quotient",
    ),
    Mutation(
        "a GPU divides by a rounded reciprocal",
        "quotient.py",
        "wide = WIDE[part.dtype.name]",
        "wide = part.dtype",
        "quotient",
    ),
    Mutation(
        "a quotient does not know what it is divided by",
        "quotient.py",
        "        dot = dot - result * whole_dot",
        "        pass",
        "quotient",
    ),
    Mutation(
        "a GPU makes an origin anew for each use",
        "stored.py",
        'barrier("computed_once", "cuda", "rocm")',
        'barrier("computed_once")',
        "quotient",
    ),
    Mutation(
        "the origin of all members may be made anew for each use",
        "origin.py",
        "return computed_once(share(",
        "return (share(",
        "quotient",
    ),
    Mutation(
        "a quotient differs over devices as its dividend does",
        "quotient.py",
        "if jax.typeof(part) != jax.typeof(whole):",
        "if False:",
        "quotient",
    ),
    Mutation(
        "squares of complex numbers are not of their size",
        "sums.py",
        "jnp.real(jnp.conj(a) * b) if",
        "jnp.real(a * b) if",
        "accuracy",
    ),
    Mutation(
        "the origin is a single value",
        "origin.py",
        "lax.slice_in_dim(x, 0, -(-x.shape[axis] // parts), axis=axis)",
        "lax.slice_in_dim(x, 0, 1, axis=axis)",
        "origin",
    ),
    Mutation(
        "a part may be of a few values",
        "origin.py",
        "min(16, size // 128)",
        "16",
        "origin",
    ),
    Mutation(
        "the part's sum is divided by twice its count",
        "origin.py",
        "    return share(total, batch_size(x, axes))",
        "    return share(total, 2 * batch_size(x, axes))",
        "origin",
    ),
    Mutation(
        "sharded axes are cut",
        "together.py",
        "for axis in summed[1:] if x.sharding.spec[axis] is None]",
        "for axis in summed[1:]]",
        "origin",
    ),
    Mutation(
        "a batch on several devices is cut",
        "together.py",
        "return context.num_devices == 1",
        "return True",
        "together",
    ),
    Mutation(
        "the sums are added one by one",
        "sums.py",
        "add_together(parts, axes)",
        "[add_over(part, batch_axes(x, axes)) for part in parts]",
        "traffic",
    ),
    Mutation(
        "spread values are not summed in one pass",
        "standardize.py",
        "slope, move, *bias = spread_together([slope, move, *bias], x, axes)",
        "slope, move, *bias = (spread(v, x, axes) for v in [slope, move, *bias])",
        "traffic",
    ),
    Mutation(
        "half precision may be kept wide",
        "standardize.py",
        "collapse(stored(x), axes)",
        "collapse(x, axes)",
        "traffic",
    ),
    Mutation(
        "y is kept for the backward pass",
        "rounded.py",
        "mlir.lower_fun(cut, multiple_results=False)",
        "mlir.lower_fun(convert, multiple_results=False)",
        "traffic",
    ),
    Mutation(
        "y is cut, not rounded",
        "rounded.py",
        "lax.reduce_precision(values, 8, 7)",
        "values",
        "rounded",
    ),
    Mutation(
        "no jax.checkpoint",
        "standardize.py",
        "once = functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)",
        "once = functools.partial",
        "traffic",
    ),
    Mutation(
        "the derivative of the variance is that of the mean of squares",
        "moments.py",
        "- 2 * inner(mean, mean_dot)",
        "- 0 * inner(mean, mean_dot)",
        "gradients",
    ),
    Mutation(
        "the derivative of the mean forgets that weights count",
        "moments.py",
        "mean_dot = mean_dot - mean * count_dot.astype(mean.dtype)",
        "pass",
        "gradients",
    ),
    Mutation(
        "a symbolic size is taken for an array",
        "sums.py",
        "return not isinstance(count, Array | np.ndarray | np.generic)",
        "return isinstance(count, int)",
        "transforms",
    ),
    Mutation(
        "the derivative of the variance forgets that weights count",
        "moments.py",
        "var_dot = var_dot - (var + square(mean)) * count_dot",
        "pass",
        "gradients",
    ),
    Mutation(
        "members of an axis each count all of x once",
        "standardize.py",
        "sums._replace(count=count), replicas)",
        "sums, replicas)",
        "transforms",
    ),
    # together.py
    Mutation(
        "a spread value's tangent is another's",
        "together.py",
        "return [next(sums) if ask else None for ask in asked] + [None]",
        "return [*reversed([next(sums) if ask else None for ask in asked]), None]",
        "together",
    ),
    Mutation(
        "a vmapped array is summed along the wrong axis",
        "together.py",
        "return jnp.moveaxis(value, dim, 0)",
        "return value",
        "together",
    ),
    Mutation(
        "shard_map does not know that spread values differ",
        "together.py",
        "(value + zero for value in values)",
        "values",
        "transforms",
    ),
    Mutation(
        "only one of the summed arrays has a tangent",
        "together.py",
        "tangents = map(instantiate, tangents)\n    return add_p",
        "tangents = [instantiate(t) * (n == 0) for n, t in enumerate(tangents)]\n    return add_p",
        "gradients",
    ),
    Mutation(
        "spread values do not take x's sharding",
        "together.py",
        " + for_each_feature(0, x, axes, dtype)",
        "",
        "together",
    ),
    Mutation(
        "on an unknown mesh, inner axes are cut",
        "together.py",
        "certain = is_local(context) or mesh.are_all_axes_explicit",
        "certain = True",
        "together",
    ),
    Mutation(
        "what is not batched loses the batch axis' sharding",
        "together.py",
        "spec = (jax.typeof(like).sharding.spec[at], *sharding.spec)",
        "spec = (None, *sharding.spec)",
        "together",
    ),
    Mutation(
        "op by op, sharded axes are cut for the origin",
        "origin.py",
        "within=inner_axes(jax.typeof(x), axes))",
        "within=batch_axes(x, axes)[1:])",
        "origin",
    ),
    # standardize.py
    Mutation(
        "the residual of the mean is lost",
        "standardize.py",
        "center(x, origin, axes) - spread(mean, x, axes), x, weights",
        "center(x, origin, axes), x, weights",
        "accuracy",
    ),
    Mutation(
        "the derivative forgets that the mean moves",
        "standardize.py",
        "gain * mean_dot",
        "0 * gain * mean_dot",
        "gradients",
    ),
    Mutation(
        "the derivative forgets that the variance moves",
        "standardize.py",
        "r * (var_dot + epsilon_dot)",
        "r * (jnp.zeros_like(var_dot) + epsilon_dot)",
        "gradients",
    ),
    Mutation(
        "the derivative forgets ε",
        "standardize.py",
        "(var_dot + epsilon_dot)",
        "(var_dot)",
        "gradients",
    ),
    Mutation(
        "the derivative of r has the wrong sign",
        "standardize.py",
        "r_dot = (-0.5 * (r",
        "r_dot = (0.5 * (r",
        "gradients",
    ),
    Mutation(
        "r³ before the tangent",
        "standardize.py",
        "(r * (r * (r * (var_dot + epsilon_dot))))",
        "(r * r * r * (var_dot + epsilon_dot))",
        "constant",
    ),
    Mutation(
        "the derivative forgets the scale's tangent",
        "standardize.py",
        "slope = slope + params_dot.scale.astype(wide) * r",
        "slope = slope + 0 * params_dot.scale.astype(wide) * r",
        "gradients",
    ),
    Mutation(
        "the derivative forgets the bias's tangent",
        "standardize.py",
        "[params_dot.bias.astype(wide)]",
        "[0 * params_dot.bias.astype(wide)]",
        "gradients",
    ),
    Mutation(
        "padding moves with the mean",
        "standardize.py",
        "y_dot = without_padding(y_dot + move, x, weights)",
        "y_dot = y_dot + move",
        "gradients",
    ),
    Mutation(
        "the bias of masked data goes to what counts",
        "standardize.py",
        "if weights is None and bias:",
        "if bias:",
        "gradients",
    ),
    Mutation(
        "weights have no derivative in the count",
        "sums.py",
        "parts.append(weights.astype(parts[1].dtype))",
        "parts.append(lax.stop_gradient(weights.astype(parts[1].dtype)))",
        "gradients",
    ),
    Mutation(
        "y keeps the precision of the statistics",
        "standardize.py",
        "return rounded(transform(deviation, r, params, axes), x.dtype)",
        "return transform(deviation, r, params, axes)",
        "accuracy",
    ),
    Mutation(
        "in half precision, what flows back is rounded twice",
        "standardize.py",
        "wide = x.astype(origin.dtype)",
        "wide = x",
        "accuracy",
    ),
    Mutation(
        "a constant feature passes half of a higher derivative on",
        "moments.py",
        "lax.select(var < 0, jnp.zeros_like(var), var)",
        "jnp.maximum(var, jnp.zeros_like(var))",
        "constant",
    ),
    Mutation(
        "the sums are those of one member",
        "standardize.py",
        "sums = sum_over(sums._replace(count=count), replicas)",
        "sums = sums._replace(count=count)",
        "transforms",
    ),
    # normalize.py
    Mutation(
        "ε is dropped",
        "normalize.py",
        "var + jnp.asarray(epsilon, var.dtype)",
        "var + 0 * jnp.asarray(epsilon, var.dtype)",
        "torch",
    ),
    Mutation(
        "ε is added to the standard deviation",
        "normalize.py",
        "var + jnp.asarray(epsilon, var.dtype)",
        "(jnp.sqrt(var) + jnp.asarray(epsilon, var.dtype)) ** 2",
        "torch",
    ),
    Mutation(
        "a broken variance passes for a flat one",
        "normalize.py",
        "flat, one = padded == 0, jnp",
        "flat, one = ~(padded > 0), jnp",
        "state",
    ),
    Mutation(
        "1/0 is not guarded",
        "normalize.py",
        "lax.select(flat, one, padded)",
        "padded",
        "constant",
    ),
    Mutation(
        "scale acts on bias too",
        "normalize.py",
        "y = centered * spread(multiplier, centered, axes)\n",
        "y = centered * spread(multiplier, centered, axes)\n"
        "    if params.bias is not None and params.scale is not None:\n"
        "        return (y + spread(jnp.asarray(params.bias * params.scale, wide), y, axes))\n",
        "torch",
    ),
    Mutation(
        "evaluation rounds the state to x's dtype",
        "normalize.py",
        "spread(jnp.asarray(mean, wide), x, axes)",
        "spread(jnp.asarray(mean, wide).astype(x.dtype).astype(wide), x, axes)",
        "accuracy",
    ),
    Mutation(
        "as_affine forgets to center",
        "normalize.py",
        "offset = -scale * jnp.asarray(state.mean, wide)",
        "offset = 0 * scale",
        "laws",
    ),
    Mutation(
        "as_affine has the wrong sign",
        "normalize.py",
        "offset = -scale * jnp",
        "offset = scale * jnp",
        "laws",
    ),
    # averages.py
    Mutation(
        "the weights of past and batch are swapped",
        "averages.py",
        "kept, new = weights_of(",
        "new, kept = weights_of(",
        "averages",
    ),
    Mutation(
        "biased for unbiased",
        "averages.py",
        "share(moments.count, left) * moments.var if unbiased else moments.var",
        "moments.var",
        "averages",
    ),
    Mutation(
        "unbiased for biased",
        "averages.py",
        "* moments.var if unbiased else moments.var",
        "* moments.var",
        "averages",
    ),
    Mutation(
        "the count is not guarded",
        "averages.py",
        "seen = (left if unbiased else moments.count) > 0",
        "seen = moments.count >= 0",
        "state",
    ),
    Mutation(
        "one value is enough for an unbiased variance",
        "averages.py",
        "(left if unbiased else moments.count) > 0",
        "moments.count > 0",
        "state",
    ),
    Mutation(
        "means that are not finite enter",
        "averages.py",
        "jnp.isfinite(new_mean) & jnp.isfinite(new_var)",
        "jnp.isfinite(new_var)",
        "state",
    ),
    Mutation(
        "variances that are not finite enter",
        "averages.py",
        "jnp.isfinite(new_mean) & jnp.isfinite(new_var)",
        "jnp.isfinite(new_mean)",
        "state",
    ),
    Mutation(
        "one bad channel stops all",
        "averages.py",
        "jnp.isfinite(new_mean) & jnp.isfinite(new_var)",
        "(jnp.isfinite(new_mean) & jnp.isfinite(new_var)).all()",
        "state",
    ),
    Mutation(
        "the count of a bad channel goes on",
        "averages.py",
        "jnp.where(good, count + jnp.ones_like(count), state.count)",
        "count + jnp.ones_like(count)",
        "state",
    ),
    Mutation(
        "the state is mixed in the precision of the batch",
        "averages.py",
        "batch, real = batch.astype(past.dtype), real_dtype(past.dtype)",
        "past, real = past.astype(batch.dtype), real_dtype(batch.dtype)",
        "state",
    ),
    Mutation(
        "the average sees the count after the batch",
        "averages.py",
        "count = batches_seen(state)",
        "count = batches_seen(state) + 1",
        "averages",
    ),
    Mutation(
        "1 - decayᵗ as such",
        "averages.py",
        "past, new = 2 * decay * h, (1 - decay) * (1 + h)",
        "past, new = decay * (1 - decay**seen), 1 - decay",
        "averages",
    ),
    Mutation(
        "the debiased average is off by one",
        "averages.py",
        "rate / 2 * seen",
        "rate / 2 * (seen + 1)",
        "averages",
    ),
    Mutation(
        "decay 1 is not the plain average",
        "averages.py",
        "else CumulativeAverage().weights(count)",
        "else (1.0, 0.0)",
        "averages",
    ),
    Mutation(
        "decay is not checked for NaN",
        "averages.py",
        "if not 0 <= decay <= 1:",
        "if decay < 0 or decay > 1:",
        "errors",
    ),
    # batch_norm.py
    Mutation(
        "training forgets unbiased",
        "batch_norm.py",
        "advance(state, shift(origin, near), average, unbiased=unbiased)",
        "advance(state, shift(origin, near), average)",
        "averages",
    ),
    Mutation(
        "training ignores the average that is asked for",
        "batch_norm.py",
        "advance(state, shift(origin, near), average, unbiased=unbiased)",
        "advance(state, shift(origin, near), DebiasedEma(0.99), unbiased=unbiased)",
        "torch",
    ),
    Mutation(
        "one value per member is an error even when pooled",
        "batch_norm.py",
        "batch_size(x, axes) * (replicas.fewest if replicas else 1) == 1",
        "batch_size(x, axes) == 1",
        "state",
    ),
    Mutation(
        "an empty batch is an error",
        "batch_norm.py",
        "batch_size(x, axes) * (replicas.fewest if replicas else 1) == 1",
        "batch_size(x, axes) * (replicas.fewest if replicas else 1) <= 1",
        "state",
    ),
    Mutation(
        "evaluation by the batch",
        "batch_norm.py",
        "        if not train:\n            mean, var = state.mean, state.var\n",
        "        if not train:\n            mean, var = state.mean, state.var * 0 + 1\n",
        "laws",
    ),
    # axes.py
    Mutation(
        "features in the order they were named",
        "axes.py",
        "axes = tuple(sorted(axis % x.ndim for axis in named))",
        "axes = tuple(axis % x.ndim for axis in named)",
        "laws",
    ),
    Mutation(
        "arrays of rank seven as they are",
        "axes.py",
        "if x.ndim < 7:",
        "if x.ndim < 70:",
        "state",
    ),
    Mutation(
        "a negative weight of jax is taken",
        "axes.py",
        "if where.dtype != bool and is_concrete(where):",
        "if where.dtype != bool and isinstance(where, np.ndarray):",
        "errors",
    ),
    Mutation(
        "where is not spread over x",
        "axes.py",
        "        where & jnp.ones_like(x, bool)\n",
        "        where\n",
        "laws",
    ),
    # dtypes.py
    Mutation(
        "statistics in half precision",
        "dtypes.py",
        "return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)",
        "return jnp.dtype(dtype)",
        "accuracy",
    ),
    # inference/fold.py
    Mutation(
        "fold scales before b meets the mean",
        "inference/fold.py",
        "scale * (b - mean) + shift",
        "scale * b + (shift - scale * mean)",
        "inference/fold",
    ),
    Mutation(
        "fold takes the inputs of a transposed kernel",
        "inference/fold.py",
        "axis=-2 if transpose_kernel else -1",
        "axis=-1",
        "inference/fold",
    ),
    Mutation(
        "fold forgets that the kernel is rounded",
        "inference/fold.py",
        "new.astype(wide), precision",
        "(kernel.astype(wide) * scale[:, None]), precision",
        "inference/fold",
    ),
    Mutation(
        "fold in half precision",
        "inference/fold.py",
        "functools.reduce(np.promote_types, map(statistics_dtype, dtypes))",
        "kernel.dtype",
        "inference/fold",
    ),
    # ghost.py, replicas.py, pool_states.py, and weights of zero
    Mutation(
        "what is left over is padded, and not masked",
        "ghost.py",
        "x, weights = jnp.pad(x, missing), jnp.pad(weights, missing)",
        "x, weights = jnp.pad(x, missing), None",
        "ghost",
    ),
    Mutation(
        "the groups' axis is always the first of the features",
        "ghost.py",
        "place = sum(axis < lead for axis in axes)",
        "place = 0 * sum(axis < lead for axis in axes)",
        "ghost",
    ),
    Mutation(
        "groups also share statistics between replicas",
        "ghost.py",
        "standardize(axes, None, x, params, epsilon, weights)",
        "standardize(axes, replicas, x, params, epsilon, weights)",
        "layouts",
    ),
    Mutation(
        "ghosts remember no other replicas",
        "ghost.py",
        "return sum_over(sums, replicas)",
        "return sum_over(sums, None)",
        "layouts",
    ),
    Mutation(
        "groups are pooled by their rounded means",
        "ghost.py",
        "pool_about(origin, near, add)",
        "pool_about(origin + near.mean, near._replace(mean=jnp.zeros_like(near.mean)), add)",
        "layouts",
    ),
    Mutation(
        "a last group of one is no error",
        "ghost.py",
        "length % group_size or min(length, group_size)",
        "min(length, group_size)",
        "ghost",
    ),
    Mutation(
        "pooling forgets how far the origins are from one another",
        "moments.py",
        "near.mean + (origin - everywhere)",
        "near.mean",
        "monoid",
    ),
    Mutation(
        "a member writes into all rows",
        "replicas.py",
        "jnp.where(here, value[None], jnp.zeros_like(value[None]))",
        "jnp.where(here | True, value[None], jnp.zeros_like(value[None]))",
        "replicas",
    ),
    Mutation(
        "a member takes the first row",
        "replicas.py",
        "lax.dynamic_index_in_dim(row, own, keepdims=False)",
        "row[0]",
        "replicas",
    ),
    Mutation(
        "other groups' values are multiplied by zero",
        "replicas.py",
        "jnp.where(here, value[None], jnp.zeros_like(value[None]))",
        "here.astype(value.dtype) * value[None]",
        "replicas",
    ),
    Mutation(
        "groups may leave members out",
        "replicas.py",
        "sorted(sum(groups, ())) != list(range(members))",
        "len(set(sum(groups, ()))) != len(sum(groups, ()))",
        "replicas",
    ),
    Mutation(
        "any group is as large as the largest",
        "replicas.py",
        "min(map(len, self.groups))",
        "max(map(len, self.groups))",
        "replicas",
    ),
    Mutation(
        "pooled states lose the variance between them",
        "pool_states.py",
        "pool_by(Moments(mean, var, count",
        "pool_by(Moments(0 * mean, var, count",
        "pool_states",
    ),
    Mutation(
        "a state that nobody has seen becomes 0",
        "pool_states.py",
        "lax.select(total > 0, pooled.var[0], var[0])",
        "pooled.var[0]",
        "pool_states",
    ),
    Mutation(
        "a weight of zero has no derivative",
        "sums.py",
        "kept = kept | jnp.isfinite(square(values))",
        "pass",
        "gradients",
    ),
    Mutation(
        "a weight of zero times a square that overflows",
        "sums.py",
        "kept = kept | jnp.isfinite(square(values))",
        "kept = kept | jnp.isfinite(values)",
        "gradients",
    ),
    Mutation(
        "sharded parameters meet replicated features",
        "batch_norm.py",
        "(*(shard_like(part, feature_spec(x, axes)) for part in params))",
        "(*params)",
        "transforms",
    ),
    Mutation(
        "sharded moments meet a replicated state",
        "averages.py",
        "shard_like(part, own) for part in moments",
        "part for part in moments",
        "transforms",
    ),
    Mutation(
        "inference spreads y as its parameters are",
        "normalize.py",
        "shard_like(part, spec) for part in (mean, var, *params)",
        "part for part in (mean, var, *params)",
        "transforms",
    ),
    Mutation(
        "named tuples cannot be exported",
        "exported.py",
        "export.register_namedtuple_serialization(kind, serialized_name",
        "dict(kind=kind, serialized_name",
        "transforms",
    ),
    Mutation(
        "lists of integers stay integers",
        "checks.py",
        "return array.astype(jnp.result_type(float)) if exact else array",
        "return array",
        "errors",
    ),
    Mutation(
        "importances count",
        "sums.py",
        "jnp.issubdtype(weights.dtype, jnp.floating)",
        "False",
        "weights",
    ),
    Mutation(
        "integers are importances",
        "sums.py",
        "jnp.issubdtype(weights.dtype, jnp.floating)",
        "weights.dtype != bool",
        "weights",
    ),
    Mutation(
        "what rounding leaves of a single weight is corrected",
        "moments.py",
        "left > 1e-4 * count",
        "left > 0",
        "weights",
    ),
    Mutation(
        "merge forgets the squares of one side",
        "moments.py",
        "squares = square_a + square_b",
        "squares = square_a",
        "monoid",
    ),
    Mutation(
        "a single value is scaled by ε",
        "standardize.py",
        "lax.select(left > 0, r, jnp.zeros_like(r))",
        "r",
        "weights",
    ),
    Mutation(
        "padding is known in training only",
        "batch_norm.py",
        '"feature_axis": axes, "where": where}',
        '"feature_axis": axes}',
        "weights",
    ),
    Mutation(
        "a negative variance passes within ε",
        "normalize.py",
        "lax.select(var < 0, var, var +",
        "(var +",
        "state",
    ),
    Mutation(
        "the new batch weighs 1 minus a rounded weight",
        "averages.py",
        'getattr(average, "weights", None)',
        "None",
        "averages",
    ),
    Mutation(
        "a weight beyond 1 enters",
        "averages.py",
        "weight = (kept >= 0) & (kept <= 1)",
        "weight = kept >= 0",
        "state",
    ),
    Mutation(
        "loaded statistics are forgotten",
        "averages.py",
        "return jnp.where(loaded, jnp.full_like(count, LOADED), count)",
        "return count",
        "state",
    ),
    Mutation(
        "a loaded variance does not tell",
        "averages.py",
        "(mean != 0) | ((var != 1) & (var != 0))",
        "(mean != 0)",
        "state",
    ),
    Mutation(
        "a traced decay of 0 is not a number",
        "averages.py",
        "number.tiny, 1 - number.epsneg",
        "0, 1 - number.epsneg",
        "averages",
    ),
    Mutation(
        "a traced decay of 1 is not a number",
        "averages.py",
        "number.tiny, 1 - number.epsneg",
        "number.tiny, 1",
        "averages",
    ),
    Mutation(
        "a count knows nothing of an explicit mesh",
        "axes.py",
        "number, dtype, sharding=sharding)",
        "number, dtype)",
        "ghost",
    ),
]

# Mutations that change nothing that can be seen, and why.
EQUIVALENT = {
    "origin.py: no stop_gradient in origin_of": "moments do not depend on the origin, so the "
    "derivatives through it cancel; stopping them only saves the work",
    "moments.py: no selection at 0": "a guard: about an origin so near, no data were found whose "
    "variance came out negative",
    "standardize.py: the moments have a tangent": "advance stops it, and nothing else uses it",
    "averages.py: no stop_gradient in advance": "in `batch_norm` no gradient reaches the moments "
    "(standardize); on its own it is seen, by test_gradients",
}


def broken(mutation: Mutation) -> tuple[Path, str]:
    """The file and its broken text; the text to replace must be there exactly once."""
    name = mutation.file if "/" in mutation.file else f"core/{mutation.file}"
    text = (ROOT / "bn_jax" / name).read_text()
    if text.count(mutation.old) != 1:
        raise SystemExit(
            f"stale: {mutation.name!r} finds its text {text.count(mutation.old)} times"
        )
    return Path("bn_jax", name), text.replace(mutation.old, mutation.new)


def first_tests(mutation: Mutation) -> Path:
    """The file of tests that should notice, which must be there."""
    folder, _, name = mutation.noticed_by.rpartition("/")
    path = Path("tests", folder or "core", f"test_{name}.py")
    if not (ROOT / path).exists():
        raise SystemExit(f"stale: {mutation.name!r} should be noticed by {path}")
    return path


def failure(tree: Path, *options: str | Path) -> str | None:
    """The first test that fails on the copy; a crash, and tests without end, are failures too.

    Compiled programs are kept between runs: nearly all are those of the package as it is.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-rfE", *map(str, options)]
    command += ["-o", f"cache_dir={ROOT / '.pytest_cache' / 'mutate'}"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": ""}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=3600
        )
    except subprocess.TimeoutExpired:
        return "no end"
    if not done.returncode:
        return None
    named = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return named[0].split(" - ")[0] if named else f"exit status {done.returncode}"


def verdict(mutation: Mutation) -> str:
    """By what a mutation is caught, or that it survives."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        for name in "bn_jax", "tests":
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", tree)
        path, text = broken(mutation)
        (tree / path).write_text(text)
        first = first_tests(mutation)
        if found := failure(tree, first):
            return f"caught by {found}"
        others = failure(tree, first.parent, f"--ignore={first}")
        return f"caught, if only by {others}" if others else "SURVIVES"


def main(words: list[str]) -> int:
    """Run those that are asked for; the exit status is the number of survivors."""
    chosen = [m for m in MUTATIONS if not words or any(w in m.name + m.file for w in words)]
    for mutation in chosen:
        broken(mutation), first_tests(mutation)
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for mutation, found in zip(chosen, threads.map(verdict, chosen), strict=True):
            survivors += found == "SURVIVES"
            print(f"{mutation.file}: {mutation.name}: {found}", flush=True)
    print(f"{survivors} of {len(chosen)} survive; {len(EQUIVALENT)} are known to change nothing")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
