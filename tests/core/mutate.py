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
        "merge forgets one of the counts",
        "moments.py",
        "count = a.count + b.count",
        "count = a.count",
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
        "pooling forgets how far the origins are from one another",
        "moments.py",
        "near.mean + (origin - everywhere)",
        "near.mean",
        "monoid",
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
        "merge steps from the smaller set",
        "moments.py",
        "from_a = share_b <= share_a",
        "from_a = share_b > share_a",
        "monoid",
    ),
    Mutation(
        "merge has the wrong sign of the step",
        "moments.py",
        "lax.select(from_a, share_b, -share_a)",
        "lax.select(from_a, -share_b, share_a)",
        "monoid",
    ),
    Mutation(
        "merge forgets what the means' rounding lost",
        "moments.py",
        " + (rest_of(b) - rest_of(a))",
        "",
        "compositions",
    ),
    Mutation(
        "merge loses what its own mean's rounding loses",
        "moments.py",
        "mean, rest = exact_sum(start, rest + step)",
        "mean, rest = start + (rest + step), 0 * rest",
        "compositions",
    ),
    Mutation(
        "pool weighs all members alike",
        "moments.py",
        "    total, squared = count.astype(mean.dtype)",
        "    count = jnp.ones_like(count)\n    total, squared = count.astype(mean.dtype)",
        "monoid",
    ),
    Mutation(
        "pool starts from rounded means",
        "moments.py",
        "near = moments._replace(mean=rest_of(moments))",
        "near = moments._replace(mean=0 * rest_of(moments))",
        "compositions",
    ),
    Mutation(
        "measured moments have no rest",
        "moments.py",
        "return near._replace(mean=mean, rest=rest)",
        "return near._replace(mean=mean)",
        "compositions",
    ),
    Mutation(
        "the mean is not moved back",
        "moments.py",
        "mean, rest = exact_sum(origin, near.mean)",
        "mean, rest = origin, near.mean",
        "monoid",
    ),
    Mutation(
        "variance without the square of the mean's residual",
        "moments.py",
        "(squared - inner(total, mean))",
        "squared",
        "monoid",
    ),
    Mutation(
        "the derivative of the variance is that of the mean of squares",
        "moments.py",
        "-2 * inner(mean, mean_dot)",
        "-0 * inner(mean, mean_dot)",
        "gradients",
    ),
    Mutation(
        "the derivative of the mean forgets that weights count",
        "moments.py",
        "total_dot = add([total_dot, -(mean * count_dot.astype(mean.dtype))])",
        "pass",
        "gradients",
    ),
    Mutation(
        "the derivative of the variance forgets that weights count",
        "moments.py",
        "squared_dot = add([squared_dot, -((var + square(mean)) * count_dot)])",
        "pass",
        "gradients",
    ),
    Mutation(
        "what is left of importances is the sum of weights minus one",
        "moments.py",
        "left = count - share(squares, count)",
        "left = count - 1",
        "weights",
    ),
    # sums.py
    Mutation(
        "a quotient of nothing is not guarded",
        "sums.py",
        "return lax.select(whole > 0, whole, jnp.ones_like(whole)).astype(part.dtype)",
        "return whole.astype(part.dtype)",
        "monoid",
    ),
    Mutation(
        "squares of complex numbers are not of their size",
        "sums.py",
        "jnp.real(jnp.conj(a) * b) if",
        "jnp.real(a * b) if",
        "monoid",
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
        "the shared origin is a plain mean of the members",
        "sums.py",
        "add((count.astype(origin.dtype) * origin, count))",
        "add((jnp.where(count > 0, origin, 0), jnp.sign(count)))",
        "accuracy",
    ),
    Mutation(
        "the origin of each member is its own",
        "sums.py",
        "        origin = shared_origin(origin, count, lambda parts: sum_over(parts, replicas))\n",
        "        pass\n",
        "state",
    ),
    Mutation(
        "the origin is zero",
        "sums.py",
        "origin = part_mean(x, like)",
        "origin = 0 * part_mean(x, like)",
        "accuracy",
    ),
    Mutation(
        "one step to the origin of weighted data",
        "sums.py",
        "range(1 if weights.dtype == bool else 2)",
        "range(1)",
        "constant",
    ),
    Mutation(
        "weights are not squared away: Σ w² d²",
        "sums.py",
        "origin, weights=weights, times=times)\n    squares",
        "origin, weights=weights, times=None if times is None else times * times)\n    squares",
        "monoid",
    ),
    Mutation(
        "the origin may be computed again for each use",
        "sums.py",
        "return same_everywhere(origin)",
        "return origin",
        "core/xla/division",
    ),
    Mutation(
        "a count of nothing is divided by",
        "sums.py",
        "lax.select(whole > 0, whole, jnp.ones_like(whole))",
        "whole",
        "monoid",
    ),
    Mutation(
        "integer weights are importances",
        "sums.py",
        "if times is not None and are_importances(weights):",
        "if times is not None:",
        "weights",
    ),
    # centered.py
    Mutation(
        "padding is not dropped",
        "centered.py",
        "    x = zero_unless(keep, x)  # before anything is computed from it, for debug_nans\n",
        "",
        "centered",
    ),
    Mutation(
        "all that is masked out is dropped from y, finite or not",
        "centered.py",
        'if drop == "broken" or importances:',
        "if importances:",
        "state",
    ),
    Mutation(
        "masked-out values are not left out of sums",
        "centered.py",
        "        factor = keep.astype(d.dtype) if factor is None else zero_unless(keep, factor)\n",
        "        pass\n",
        "monoid",
    ),
    Mutation(
        "a weight of zero has no derivative",
        "centered.py",
        "keep = counted | (keep & jnp.isfinite(d * d))",
        "keep = counted",
        "gradients",
    ),
    Mutation(
        "a weight of zero times a square that overflows",
        "centered.py",
        "(keep & jnp.isfinite(d * d))",
        "(keep & jnp.isfinite(d))",
        "gradients",
    ),
    Mutation(
        "the residual of the mean is lost",
        "centered.py",
        "    d = d if mean is None else d - mean\n",
        "",
        "accuracy",
    ),
    Mutation(
        "the residual of the mean is lost where nothing is masked",
        "centered.py",
        "return d if mean is None else d - mean, None",
        "return d, None",
        "accuracy",
    ),
    Mutation(
        "the derivative forgets that the mean moves",
        "centered.py",
        "moves[k] = add([moves.get(k), -c * mean_dot])",
        "pass",
        "gradients",
    ),
    Mutation(
        "sums forget that the mean moves",
        "centered.py",
        "dots[k + 1].append(-(k + 1) * mean_dot * total)",
        "pass",
        "centered",
    ),
    Mutation(
        "sums forget the power",
        "centered.py",
        "dots[k + 1].append((k + 1) * total)",
        "dots[k + 1].append(total)",
        "gradients",
    ),
    Mutation(
        "polynomials forget that coefficients move",
        "centered.py",
        "moves = dict(zip(powers, rest_dots[timed:], strict=True))",
        "moves = {}",
        "gradients",
    ),
    Mutation(
        "a polynomial's factor has no tangent",
        "centered.py",
        "    if timed and rest_dots[0] is not None:",
        "    if False:",
        "centered",
    ),
    Mutation(
        "masked values move with x",
        "centered.py",
        'if slope.keys() == {0} and not times and not options["masked"]:',
        "if slope.keys() == {0} and not times:",
        "gradients",
    ),
    Mutation(
        "coefficients get each other's cotangents",
        "centered.py",
        "if timed else cotangents)",
        "if timed else cotangents)[::-1]",
        "gradients",
    ),
    Mutation(
        "the wide x is kept",
        "centered.py",
        "return bind(x, x, *fixed, *factors, **options)",
        "return bind(*operands[:2], *fixed, *factors, **options)",
        "traffic",
    ),
    Mutation(
        "the sums are added one by one",
        "centered.py",
        "return add_together(terms_of_sums(*operands, **options), summed(operands[2]), alone)",
        "return plain_sums(*operands, **options)",
        "traffic",
    ),
    Mutation(
        "the origin is a single row",
        "centered.py",
        "rows = -(-x.shape[axis] // parts)",
        "rows = 1",
        "sums",
    ),
    Mutation("a part may be of a few values", "centered.py", "min(16, size // 128)", "16", "sums"),
    Mutation(
        "the part's sum is divided by twice its count",
        "centered.py",
        "share = 1 / max(size, 1)",
        "share = 0.5 / max(size, 1)",
        "sums",
    ),
    Mutation(
        "numbers per feature do not vary as x does",
        "centered.py",
        "    if jax.typeof(number) == wanted:\n        return number\n",
        "    return number\n",
        "transforms",
    ),
    # normalize.py
    Mutation(
        "a broken variance passes for a flat one",
        "normalize.py",
        "flat, one = padded == 0, jnp",
        "flat, one = ~(padded > 0), jnp",
        "state",
    ),
    Mutation(
        "1/0 is not guarded", "normalize.py", "lax.select(flat, one, padded)", "padded", "constant"
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
    Mutation(
        "a negative variance passes within ε",
        "normalize.py",
        "lax.select(var < 0, var, var +",
        "(var +",
        "state",
    ),
    Mutation(
        "the derivative of r has the wrong sign",
        "normalize.py",
        "-0.5 * (r * (r",
        "0.5 * (r * (r",
        "gradients",
    ),
    Mutation(
        "r³ before the tangent",
        "normalize.py",
        "-0.5 * (r * (r * (r * moved)))",
        "-0.5 * (r * r * r * moved)",
        "constant",
    ),
    Mutation(
        "the derivative forgets ε",
        "normalize.py",
        "moved = bind_inverse_std(*operands), add(tangents)",
        "moved = bind_inverse_std(*operands), tangents[0]",
        "gradients",
    ),
    Mutation(
        "y keeps the precision of the statistics",
        "normalize.py",
        "return downcast(y, x.dtype)",
        "return y",
        "accuracy",
    ),
    Mutation(
        "ε is dropped",
        "normalize.py",
        "padded = lax.select(var < 0, var, var + epsilon)",
        "padded = lax.select(var < 0, var, var + 0 * epsilon)",
        "torch",
    ),
    Mutation(
        "ε is added to the standard deviation",
        "normalize.py",
        "padded = lax.select(var < 0, var, var + epsilon)",
        "padded = lax.select(var < 0, var, (jnp.sqrt(var) + epsilon) ** 2)",
        "torch",
    ),
    Mutation(
        "ε hides a negative variance",
        "normalize.py",
        "lax.select(var < 0, var, var + epsilon)",
        "var + epsilon",
        "state",
    ),
    Mutation(
        "scale acts on bias too",
        "normalize.py",
        "    scale, bias = affine\n",
        "    scale, bias = affine\n    bias = bias * scale\n",
        "torch",
    ),
    Mutation(
        "what rounding lost of the mean is not used",
        "normalize.py",
        "return apply_statistics(x, x.astype(mean.dtype), mean, rest,",
        "return apply_statistics(x, x.astype(mean.dtype), mean, 0 * rest,",
        "compositions",
    ),
    Mutation(
        "the bias of masked data goes to what counts",
        "normalize.py",
        "y = polynomial((1,), x, wide, origin, mean, [slope], weights=weights) + bias",
        "y = polynomial((0, 1), x, wide, origin, mean, [bias, slope], weights=weights)",
        "state",
    ),
    # standardize.py
    Mutation(
        "in half precision, what flows back is rounded twice",
        "standardize.py",
        "wide = x.astype(origin.dtype)",
        "wide = x",
        "accuracy",
    ),
    Mutation(
        "a single value is scaled by ε",
        "standardize.py",
        "lax.select(left > 0, r, jnp.zeros_like(r))",
        "r",
        "weights",
    ),
    Mutation(
        "the sums are those of one member",
        "standardize.py",
        "marked(sum_over(sums_about(origin, x, wide, weights), replicas))",
        "marked(sums_about(origin, x, wide, weights))",
        "transforms",
    ),
    Mutation(
        "a variance of what a mask leaves of one value",
        "standardize.py",
        "        r = lax.select(left > 0, r, jnp.zeros_like(r))\n",
        "        pass\n",
        "weights",
    ),
    Mutation(
        "one value per member is an error even when pooled",
        "standardize.py",
        "if layout.count * (replicas.fewest if replicas else 1) != 1:",
        "if layout.count != 1:",
        "state",
    ),
    Mutation(
        "an empty batch is an error",
        "standardize.py",
        "if layout.count * (replicas.fewest if replicas else 1) != 1:",
        "if layout.count * (replicas.fewest if replicas else 1) > 1:",
        "state",
    ),
    Mutation(
        "a last group of one is no error",
        "standardize.py",
        "math.prod([groups.smallest,",
        "math.prod([groups.size,",
        "ghost",
    ),
    Mutation(
        "what is left over is padded, and not masked",
        "ghost.py",
        "if self.missing and weights is None:",
        "if False:",
        "ghost",
    ),
    Mutation(
        "ghosts remember no other replicas",
        "standardize.py",
        "sum_over(groups.add(parts), replicas))",
        "groups.add(parts))",
        "layouts",
    ),
    Mutation(
        "groups are pooled by their rounded means",
        "standardize.py",
        "pool_centered(origin, near, lambda",
        "pool_centered(origin + near.mean, near._replace(mean=jnp.zeros_like(near.mean)), lambda",
        "layouts",
    ),
    Mutation(
        "groups also share statistics between replicas",
        "standardize.py",
        "by_own_moments(x, affine, epsilon, weights, None)",
        "by_own_moments(x, affine, epsilon, weights, replicas)",
        "layouts",
    ),
    # averages.py
    Mutation(
        "the debiased average is off by one",
        "averages.py",
        "rate / 2 * seen",
        "rate / 2 * (seen + 1)",
        "averages",
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
        "1 - decayᵗ as such",
        "averages.py",
        "return new / (2 * decay * h + new)",
        "return (1 - decay) / (1 - decay ** (seen + 1))",
        "averages",
    ),
    Mutation(
        "decay 1 is not the plain average",
        "averages.py",
        "else CumulativeAverage().new_weight(count)",
        "else 0.0",
        "averages",
    ),
    Mutation(
        "the new batch weighs 1 minus a rounded weight",
        "averages.py",
        'getattr(average, "new_weight", None)',
        "None",
        "averages",
    ),
    # state.py
    Mutation(
        "the weights of past and batch are swapped",
        "state.py",
        "new = weight_of_new_batch(",
        "new = 1 - weight_of_new_batch(",
        "averages",
    ),
    Mutation(
        "biased for unbiased",
        "state.py",
        "share(moments.count, left) * moments.var if unbiased else moments.var",
        "moments.var",
        "averages",
    ),
    Mutation(
        "unbiased for biased",
        "state.py",
        "* moments.var if unbiased else moments.var",
        "* moments.var",
        "averages",
    ),
    Mutation(
        "the count is not guarded",
        "state.py",
        "good = (left if unbiased else moments.count) > 0",
        "good = moments.count >= 0",
        "state",
    ),
    Mutation(
        "one value is enough for an unbiased variance",
        "state.py",
        "(left if unbiased else moments.count) > 0",
        "moments.count > 0",
        "state",
    ),
    Mutation(
        "means that are not finite enter", "state.py", " & jnp.isfinite(new_mean)", "", "state"
    ),
    Mutation(
        "variances that are not finite enter", "state.py", " & jnp.isfinite(new_var)", "", "state"
    ),
    Mutation(
        "one bad channel stops all",
        "state.py",
        "jnp.isfinite(new_mean) & jnp.isfinite(new_var)",
        "(jnp.isfinite(new_mean) & jnp.isfinite(new_var)).all()",
        "state",
    ),
    Mutation(
        "the count of a bad channel goes on",
        "state.py",
        "lax.select(good, count + jnp.ones_like(count), state.count)",
        "count + jnp.ones_like(count)",
        "state",
    ),
    Mutation(
        "the state is mixed in the precision of the batch",
        "state.py",
        "new, batch = new.astype(past.dtype), batch.astype(past.dtype)",
        "new, past = new.astype(batch.dtype), past.astype(batch.dtype)",
        "state",
    ),
    Mutation(
        "the average sees the count after the batch",
        "state.py",
        "    count = batches_seen(state)\n",
        "    count = batches_seen(state) + 1\n",
        "averages",
    ),
    Mutation(
        "a small step is taken from the new batch's side",
        "state.py",
        "jnp.real(new) > 0.5",
        "jnp.real(new) > -1",
        "averages",
    ),
    Mutation(
        "a weight beyond 1 enters", "state.py", "(new >= 0) & (new <= 1)", "(new <= 1)", "state"
    ),
    Mutation(
        "loaded statistics are forgotten",
        "state.py",
        "return lax.select(loaded, jnp.full_like(count, LOADED), count)",
        "return count",
        "state",
    ),
    Mutation(
        "a loaded variance does not tell",
        "state.py",
        "(mean != 0) | ((var != 1) & (var != 0))",
        "(mean != 0)",
        "state",
    ),
    Mutation(
        "sharded moments meet a replicated state",
        "state.py",
        "jax.tree.map(lambda part: shard_like(part, own), moments)",
        "moments",
        "transforms",
    ),
    # batch_norm.py
    Mutation(
        "training forgets unbiased",
        "batch_norm.py",
        "advance(state, moments, average, unbiased=unbiased)",
        "advance(state, moments, average)",
        "accuracy",
    ),
    Mutation(
        "training ignores the average that is asked for",
        "batch_norm.py",
        "advance(state, moments, average, unbiased=unbiased)",
        "advance(state, moments, DebiasedEma(0.99), unbiased=unbiased)",
        "torch",
    ),
    Mutation(
        "evaluation by the batch",
        "batch_norm.py",
        "return normalize(x, given.mean, given.var, params, **options), state",
        "return normalize(x, given.mean, given.var * 0 + 1, params, **options), state",
        "laws",
    ),
    Mutation(
        "padding is known in training only",
        "batch_norm.py",
        '"feature_axis": layout.axes, "where": where}',
        '"feature_axis": layout.axes}',
        "weights",
    ),
    # layout.py
    Mutation(
        "features in the order they were named",
        "layout.py",
        "axes = tuple(sorted(axis % x.ndim for axis in named))",
        "axes = tuple(axis % x.ndim for axis in named)",
        "laws",
    ),
    Mutation(
        "where is not broadcast to x",
        "layout.py",
        "return where & ones if where.dtype == bool else where * ones",
        "return where",
        "laws",
    ),
    Mutation(
        "sharded parameters meet replicated features",
        "layout.py",
        "return shard_like(numbers, spec).astype(dtype).reshape(sizes)",
        "return numbers.astype(dtype).reshape(sizes)",
        "transforms",
    ),
    # checks.py
    Mutation(
        "lists of integers stay integers",
        "checks.py",
        "return array.astype(jnp.result_type(float)) if exact else array",
        "return array",
        "errors",
    ),
    Mutation(
        "decay is not checked for NaN",
        "checks.py",
        "if not 0 <= decay <= 1:",
        "if decay < 0 or decay > 1:",
        "errors",
    ),
    Mutation(
        "a negative weight of jax is taken",
        "checks.py",
        "if where.dtype != bool and is_concrete(where):",
        "if where.dtype != bool and isinstance(where, np.ndarray):",
        "errors",
    ),
    # pool_states.py
    Mutation(
        "pooled states lose the variance between them",
        "pool_states.py",
        "pool_with(Moments(mean, var, count",
        "pool_with(Moments(0 * mean, var, count",
        "pool_states",
    ),
    Mutation(
        "a state that nobody has seen becomes 0",
        "pool_states.py",
        "lax.select(total > 0, pooled.var[0], var[0])",
        "pooled.var[0]",
        "pool_states",
    ),
    # replicas.py
    Mutation(
        "batch norm pools by pmean",
        "replicas.py",
        "return lax.psum(values, axis_name)\n",
        "return lax.pmean(values, axis_name)\n",
        "state",
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
    # core/xla/barriers.py
    Mutation(
        "half precision may be kept wide",
        "core/xla/barriers.py",
        "return bind_rounded(x)[0] if jnp.finfo(x.dtype).bits < 32 else x",
        "return x",
        "traffic",
    ),
    Mutation(
        "y is kept for the backward pass",
        "core/xla/barriers.py",
        'on={"cpu": convert_by_bits},',
        "on={},",
        "traffic",
    ),
    Mutation(
        "y is cut, not rounded",
        "core/xla/barriers.py",
        "lax.reduce_precision(values, 8, 7)",
        "values",
        "core/xla/barriers",
    ),
    Mutation(
        "statistics bear no mark",
        "core/xla/barriers.py",
        "return jax.tree.map(lambda numbers: bind_marked(numbers)[0], statistics)",
        "return statistics",
        "core/xla/barriers",
    ),
    # core/xla/division.py
    Mutation(
        "divisors may become reciprocals",
        "core/xla/division.py",
        "return [part / lax.select(part != part, part, whole)]",
        "return [part / whole]",
        "constant",
    ),
    Mutation(
        "a GPU divides as it likes",
        "core/xla/division.py",
        '"cuda": in_double, "rocm": in_double',
        '"rocm": in_double',
        "core/xla/division",
    ),
    Mutation(
        "a GPU divides by a rounded reciprocal",
        "core/xla/division.py",
        "lax.convert_element_type(a, DOUBLE[part.dtype.name])",
        "lax.convert_element_type(a, part.dtype)",
        "core/xla/division",
    ),
    Mutation(
        "a quotient does not know what it is divided by",
        "core/xla/division.py",
        "part_dot = -moved if part_dot is None else part_dot - moved",
        "pass",
        "core/xla/division",
    ),
    Mutation(
        "a quotient differs over devices as its dividend does",
        "core/xla/division.py",
        "if jax.typeof(whole) != jax.typeof(part):",
        "if False:",
        "core/xla/division",
    ),
    # core/xla/notice.py
    Mutation(
        "a notice outlives its context",
        "core/xla/notice.py",
        "        current.reset(token)\n",
        "        pass\n",
        "single_value",
    ),
    # core/xla/primitives.py
    Mutation(
        "a vmapped operand keeps its axis",
        "core/xla/primitives.py",
        "return jnp.moveaxis(value, dim, 0)",
        "return value",
        "core/xla/primitives",
    ),
    Mutation(
        "what is not batched loses the batch axis' sharding",
        "core/xla/primitives.py",
        "spec = (jax.typeof(like).sharding.spec[at], *sharding.spec)",
        "spec = (None, *sharding.spec)",
        "sums",
    ),
    # core/xla/sums.py
    Mutation(
        "sharded axes are cut",
        "core/xla/sums.py",
        "if jax.typeof(x).sharding.spec[axis] is None]",
        "]",
        "sums",
    ),
    Mutation(
        "a batch on several devices is cut",
        "core/xla/sums.py",
        "return inner + (list(axes[:1]) if alone else [])",
        "return inner + list(axes[:1])",
        "sums",
    ),
    Mutation(
        "on an unknown mesh, inner axes are cut",
        "core/xla/sums.py",
        "known = alone or jax.typeof(arrays[0]).sharding.mesh.are_all_axes_explicit",
        "known = True",
        "sums",
    ),
    Mutation(
        "small sums over several axes are one sum",
        "core/xla/sums.py",
        "if len(axes) > 1 and not in_blocks:",
        "if False:",
        "core/xla/sums",
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
    # exported.py
    Mutation(
        "named tuples cannot be exported",
        "exported.py",
        "export.register_namedtuple_serialization(kind, serialized_name",
        "dict(kind=kind, serialized_name",
        "transforms",
    ),
    # population.py
    Mutation(
        "the paper's estimate weighs batches by their counts",
        "population.py",
        "weight = (left > 0).astype(var.dtype)",
        "weight = batch.count",
        "population",
    ),
    Mutation(
        "the paper's estimate is biased",
        "population.py",
        "        var = share(batch.count, left) * var\n",
        "",
        "population",
    ),
    Mutation(
        "a batch that is not finite enters",
        "population.py",
        "good = (weight > 0) & jnp.isfinite(batch.mean) & jnp.isfinite(var)",
        "good = weight > 0",
        "population",
    ),
    Mutation(
        "pooling drops the variance between batches",
        "population.py",
        "(var + seen.means.var)",
        "var",
        "population",
    ),
    Mutation(
        "pooling is biased",
        "population.py",
        "var = share(count, left) * (var",
        "var = (var",
        "population",
    ),
    Mutation(
        "a batch without values is counted",
        "population.py",
        "good.astype(jnp.int32)",
        "jnp.ones_like(seen.batches)",
        "population",
    ),
    Mutation(
        "a gradient flows into population statistics",
        "population.py",
        "return lax.stop_gradient(",
        "return (",
        "population",
    ),
    # inference/recalibrate*.py
    Mutation(
        "a layer that is used twice reports its last use",
        "inference/recording.py",
        "return merge(seen, lax.stop_gradient(moments))",
        "return merge(jax.tree.map(jnp.zeros_like, seen), lax.stop_gradient(moments))",
        "inference/recalibrate",
    ),
    Mutation(
        "recalibration ignores masks",
        "inference/recording.py",
        "where=read_mask(mask, x, axes)",
        "where=None",
        "inference/recalibrate",
    ),
    Mutation(
        "recalibration does not pool named axes",
        "inference/recording.py",
        "if layer.axis_name is not None:",
        "if False:",
        "inference/recalibrate",
    ),
    Mutation(
        "statistics of nothing replace the old ones",
        "inference/recording.py",
        "state.count > 0",
        "state.count >= 0",
        "inference/recalibrate",
    ),
    Mutation(
        "a frozen linen layer gets new statistics",
        "inference/recalibrate_linen.py",
        "if not evaluate:",
        "if True:",
        "inference/recalibrate",
    ),
    Mutation(
        "a frozen nnx layer gets new statistics",
        "inference/recalibrate_nnx.py",
        "if not given:",
        "if True:",
        "inference/recalibrate",
    ),
    Mutation(
        "dropout draws the same for every batch",
        "inference/recalibrate_nnx.py",
        "        random = nnx.state(model, nnx.RngState)\n",
        "        pass\n",
        "inference/recalibrate",
    ),
    # explain/
    Mutation(
        "the last pairs of examples are not tried",
        "explain/independence.py",
        "range(math.ceil(math.log2(n)))",
        "range(int(math.log2(n)))",
        "explain/independence",
    ),
    Mutation(
        "dependence is tried in one direction",
        "explain/independence.py",
        "for value in (0, 1):",
        "for value in (1,):",
        "explain/independence",
    ),
    Mutation(
        "the half that moves nothing is searched",
        "explain/independence.py",
        "chosen = half if moves else chosen & ~half",
        "chosen = chosen & ~half if moves else half",
        "explain/independence",
    ),
    Mutation(
        "padding is not tried",
        "explain/independence.py",
        "if padding is not None:",
        "if False:",
        "explain/independence",
    ),
    Mutation(
        "the distance forgets the means",
        "explain/compare.py",
        "(ratio + moved * (1 / v + 1 / w)) / 2",
        "ratio / 2",
        "explain/explain",
    ),
    Mutation(
        "the noise of a batch forgets the variances",
        "explain/compare.py",
        " + unsteady / v**2 / 2",
        "",
        "explain/explain",
    ),
    Mutation(
        "one conspicuous layer is enough for an inverted momentum",
        "explain/causes.py",
        "all(like.fits for like in likes)",
        "any(like.fits for like in likes)",
        "explain/explain",
    ),
    Mutation(
        "class-pure batches of images are not measured against mixed ones",
        "explain/compare.py",
        "chance = data / batch_size if mixed is None else parts_of(mixed)[2]",
        "chance = data / batch_size",
        "explain/explain",
    ),
    Mutation(
        "a lag of means is taken for one batch",
        "explain/likeness.py",
        "for value, of_batches in ((mean[live], batches.mean), (var[live], batches.var)):",
        "for value, of_batches in ((mean[live], batches.mean),):",
        "explain/explain",
    ),
    Mutation(
        "a layer's own epsilon is not read",
        "explain/models.py",
        'given if given is not None else getattr(layer, "epsilon", 1e-5)',
        "given if given is not None else 1e-5",
        "explain/explain",
    ),
    # layers/equinox.py
    Mutation(
        "inference uses the state up",
        "layers/equinox.py",
        "state.set(self.state_index, moved) if train else state",
        "state.set(self.state_index, moved)",
        "layers/equinox",
    ),
    Mutation(
        "the Equinox layer starts with Ema",
        "layers/equinox.py",
        "bn.DebiasedEma(momentum)",
        "bn.Ema(momentum)",
        "layers/equinox",
    ),
    Mutation(
        "axis names are leaves",
        "layers/equinox.py",
        "axis_name: str | tuple[str, ...] | None = eqx.field(static=True)",
        "axis_name: str | tuple[str, ...] | None",
        "layers/equinox",
    ),
    # renorm.py, correction.py, recalibrate.py
    Mutation(
        "the correction d is not clipped",
        "correction.py",
        "        d = jnp.clip(d, -d_max, d_max)\n",
        "        pass\n",
        "renorm",
    ),
    Mutation(
        "r is clipped from above only",
        "correction.py",
        "jnp.clip(batch / running, 1 / r_max, r_max)",
        "jnp.minimum(batch / running, r_max)",
        "renorm",
    ),
    Mutation(
        "a gradient flows through the correction",
        "renorm.py",
        "    moments = lax.stop_gradient(moments)\n",
        "",
        "renorm",
    ),
    Mutation(
        "renorm averages variances",
        "correction.py",
        "return BatchNormState(*(jnp.where(moved, a, b)",
        "return advance(state, moments, average, unbiased=False)\n"
        "    return BatchNormState(*(jnp.where(moved, a, b)",
        "renorm",
    ),
    Mutation(
        "a new state corrects",
        "correction.py",
        "(moments.count > 0) & (batches_seen(state) > 0) & (running > 0) & (batch > 0)",
        "(moments.count > 0) & (running > 0) & (batch > 0)",
        "renorm",
    ),
    Mutation(
        "σ = 0 is divided by",
        "correction.py",
        "(moments.count > 0) & (batches_seen(state) > 0) & (running > 0) & (batch > 0)",
        "(moments.count > 0) & (batches_seen(state) > 0)",
        "renorm",
    ),
    Mutation(
        "ghost groups share one correction",
        "renorm.py",
        "        y, moments = in_groups(run, x, where, layout, groups, replicas)\n",
        "        y, moments = run(x, where)\n",
        "renorm",
    ),
    Mutation(
        "the state of ghost groups is that of one member",
        "renorm.py",
        "return sum_over(summed, replicas)",
        "return summed",
        "renorm",
    ),
    Mutation(
        "the state of ghost groups is that of the first group",
        "renorm.py",
        "jnp.sum(part, 0, keepdims=True)",
        "part[:1]",
        "renorm",
    ),
    Mutation(
        "renorm does not refuse a ghost group of one",
        "renorm.py",
        "    x = check_batch(layout, x, replicas, groups)\n",
        "",
        "renorm",
    ),
    Mutation(
        "the Equinox layer corrects variances times m/(m - 1)",
        "layers/equinox.py",
        "renorm is None if unbiased is None else unbiased",
        "unbiased is None or unbiased",
        "layers/renorm",
    ),
    Mutation(
        "one value is remembered as a standard deviation",
        "renorm.py",
        "jnp.where(left > 0, moments.count, jnp.zeros_like(left))",
        "moments.count",
        "renorm",
    ),
    Mutation(
        "moments in the place of a state are replaced",
        "state.py",
        "return merge(Moments(*as_floats(*state)), lax.stop_gradient(moments))",
        "return lax.stop_gradient(moments)",
        "recalibrate",
    ),
    Mutation(
        "statistics of nothing replace a state",
        "recalibrate.py",
        "jnp.where(new.count > 0,",
        "jnp.where(new.count >= 0,",
        "recalibrate",
    ),
    Mutation(
        "the layers swap the limits of the correction",
        "layers/normalizer.py",
        "r_max=renorm[0], d_max=renorm[1]",
        "r_max=renorm[1], d_max=renorm[0]",
        "layers/renorm",
    ),
    Mutation(
        "the layers ignore renorm",
        "layers/normalizer.py",
        "    if renorm is None:\n",
        "    if True:\n",
        "layers/renorm",
    ),
    # layers/affine.py
    Mutation(
        "scale and bias per feature are left out beside rows per example",
        "layers/affine.py",
        "    if full == features:\n",
        "    if False:\n",
        "layers/affine",
    ),
    Mutation(
        "rows per example lie on the axis before the features",
        "layers/affine.py",
        "next((axis for axis in range(x.ndim) if axis not in axes), None)",
        "max(axis for axis in range(x.ndim) if axis not in axes)",
        "layers/affine",
    ),
    Mutation(
        "a scale in the call replaces the layer's own without a word",
        "layers/affine.py",
        "if mine is not None and other is not None:",
        "if False:",
        "layers/affine",
    ),
    Mutation(
        "the linen layer ignores scale and bias of the call",
        "layers/linen.py",
        "own_or_given(own, (scale, bias))",
        "own_or_given(own, (None, None))",
        "layers/affine",
    ),
    Mutation(
        "a batch norm with scale in its call is folded",
        "inference/fold_chain.py",
        "    if norm.affine_in_call:\n",
        "    if False:\n",
        "layers/affine",
    ),
]

# Mutations that change nothing that can be seen, and why.
EQUIVALENT = {
    "layout.py: a constant knows nothing of an explicit mesh": "`like_sums` gives numbers the type "
    "that x's sums have; a constant that has it already needs no operation for that",
    "sums.py: no stop_gradient in origin_of": "moments do not depend on the origin, so the "
    "derivatives through it cancel; stopping them only saves the work",
    "moments.py: no selection at 0": "a guard: about an origin so near, no data were found whose "
    "variance came out negative",
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
