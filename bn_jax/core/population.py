"""What the population looks like: Algorithm 2 of Ioffe & Szegedy 2015.

Running averages track the statistics while the network changes. Once it is trained, many batches
are passed through it once more, and inference normalizes by what they have in common. There are
two ways to say what that is, and the law of total variance shows what lies between them:

    Var[x] = E_B[σ_B²] + Var_B[μ_B]

The paper keeps the first term, times m/(m - 1), and gives every batch the same weight. "Precise
batch norm" (Wu & Johnson 2021) keeps both, as if all batches were one, so that every value has the
same weight. For batches drawn at random both estimate the same variance; for sorted ones, of one
class each, they differ.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_jax.core.checks import as_floats
from bn_jax.core.moments import Moments, degrees_of_freedom, merge
from bn_jax.core.state import BatchNormState
from bn_jax.core.sums import share


class Seen(NamedTuple):
    """What the batches so far have in common. Averages are kept as moments: `merge` is accurate.

    Attributes:
        means: the moments of the batches' means, each weighted as the estimator says.
        variances: the moments of the batches' variances.
        batches: how many there were.
    """

    means: Moments
    variances: Moments
    batches: Array


def population(moments: Any, *, estimator: str = "paper") -> Any:
    """The statistics to normalize by at inference, from the moments of many batches (Algorithm 2).

    "paper" is the algorithm's lines 8-10, each batch alike:
    E[x] = E_B[μ_B],  Var[x] = E_B[m/(m - 1)·σ_B²].

    "pooled" takes all batches as one (`merge`), each value alike: with N = Σ m_B,
    E[x] = (1/N) Σ m_B μ_B,  Var[x] = N/(N - 1)·(1/N) Σ m_B (σ_B² + |μ_B - E[x]|²).

    Of batches weighted by floats, m is the effective count (`Moments`). A batch says nothing about
    a feature for which it has no values, or moments that are not finite; "paper" also leaves out
    batches of one value, which have no variance.

    Args:
        moments: the moments of each batch, in any iterable; or a tree of moments for each batch, a
            network's layers; or `Moments` whose arrays have a leading axis over batches. An
            iterable is read once, and needs the memory of one batch's moments.
        estimator: "paper" or "pooled".

    Returns:
        `BatchNormState`, or the tree of them; its count is the number of batches. A feature that no
        batch has values of has the state that `init` gives: 0, 1, and a count of 0.

    Raises:
        ValueError: there are no batches, or the estimator is unknown.
        TypeError: what is given for a batch holds arrays that belong to no moments.

    >>> import jax, jax.numpy as jnp
    >>> from bn_jax.core.moments import measure
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
    >>> state = population(measure(x) for x in batches)
    >>> state.mean.tolist(), state.var.tolist(), state.count.tolist()
    ([4.0], [2.0], [2])
    >>> [round(float(v), 3) for v in population(map(measure, batches), estimator="pooled").var]
    [6.667]
    """
    check_estimator(estimator)
    if isinstance(moments, Moments):
        return of_stacked(moments, estimator)
    seen = None
    for batch in moments:
        seen = include(seen, batch, estimator)
    return conclude(seen, estimator)


def of_stacked(moments: Moments, estimator: str) -> BatchNormState:
    """The population of moments with a leading axis."""
    moments = Moments(*as_floats(*moments))
    if moments.mean.ndim == 0 or len(moments.mean) == 0:
        raise ValueError(
            f"moments have shape {moments.mean.shape}, but need [batches, features]; of one batch "
            "alone, give a list: population([moments])"
        )
    first = jax.tree.map(lambda part: part[0], moments)
    others = jax.tree.map(lambda part: part[1:], moments)

    def step(seen: Seen, batch: Moments) -> tuple[Seen, None]:
        return add(seen, batch, estimator), None

    return finish(lax.scan(step, start(first, estimator), others)[0], estimator)


@partial(jax.jit, static_argnames="estimator")
def include(seen: Any, batch: Any, estimator: str) -> Any:
    """What is seen after one more batch, or after the first if seen is None, for all layers."""

    def first(moments: Any) -> Seen:
        if not is_moments(moments):
            raise TypeError(
                f"a batch holds an array of shape {jnp.shape(moments)} that belongs to no Moments; "
                "give the moments of each batch, e.g. [measure(x) for x in batches]"
            )
        return start(Moments(*as_floats(*moments)), estimator)

    def further(moments: Moments, seen: Seen) -> Seen:
        return add(seen, Moments(*as_floats(*moments)), estimator)

    if seen is None:
        return jax.tree.map(first, batch, is_leaf=is_moments)
    return jax.tree.map(further, batch, seen, is_leaf=is_moments)


def conclude(seen: Any, estimator: str) -> Any:
    """The states of all layers."""
    if seen is None:
        raise ValueError("there are no batches, but population statistics need at least one")
    return jax.tree.map(lambda part: finish(part, estimator), seen, is_leaf=is_seen)


def start(batch: Moments, estimator: str) -> Seen:
    """What is seen after the first batch."""
    nothing = jax.tree.map(jnp.zeros_like, batch)
    none = jnp.zeros_like(batch.count, jnp.int32)
    return add(Seen(nothing, Moments(*[nothing.var] * 3), none), batch, estimator)


def add(seen: Seen, batch: Moments, estimator: str) -> Seen:
    """What is seen after one more batch: lines 8-10 of Algorithm 2, or all values alike."""
    weight, var = batch.count, batch.var
    if estimator == "paper":
        left = degrees_of_freedom(batch.count, batch.squares)
        weight = (left > 0).astype(var.dtype)
        var = share(batch.count, left) * var
    good = (weight > 0) & jnp.isfinite(batch.mean) & jnp.isfinite(var)
    means = batch._replace(var=jnp.zeros_like(var), count=weight)
    variances = Moments(var, jnp.zeros_like(var), weight)
    means, variances = jax.tree.map(
        lambda part: jnp.where(good, part, jnp.zeros_like(part)), (means, variances)
    )
    batches = seen.batches + good.astype(jnp.int32)
    return Seen(merge(seen.means, means), merge(seen.variances, variances), batches)


def finish(seen: Seen, estimator: str) -> BatchNormState:
    """The state by which inference normalizes."""
    mean, var, known = seen.means.mean, seen.variances.mean, seen.batches > 0
    if estimator == "pooled":
        count = seen.means.count
        left = degrees_of_freedom(count, seen.means.squares)
        known = left > 0
        var = share(count, left) * (var + seen.means.var)
    return lax.stop_gradient(
        BatchNormState(
            jnp.where(known, mean, jnp.zeros_like(mean)),
            jnp.where(known, var, jnp.ones_like(var)),
            jnp.where(known, seen.batches, jnp.zeros_like(seen.batches)),
        )
    )


def check_estimator(estimator: str) -> None:
    """Refuse an unknown one."""
    if estimator not in ("paper", "pooled"):
        raise ValueError(f'estimator={estimator!r} must be "paper" or "pooled"')


def is_moments(node: object) -> bool:
    """Whether a node of a tree is one layer's moments."""
    return isinstance(node, Moments)


def is_seen(node: object) -> bool:
    """Whether a node of a tree is what has been seen of one layer."""
    return isinstance(node, Seen)
