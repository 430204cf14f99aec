"""Which layer's result goes straight into which other, and nowhere else?

A model without Sequentials is code, which only running it can tell: it is traced once on the shapes
of an example, and every layer that matters marks what it gets and what it returns. Where a mark of
what one layer returned goes into nothing but the mark of what another gets, the second follows the
first. Three instances: conv, norm of a residual block (it does); conv, norm, where the result of
conv is also added to something (it does not); conv and norm in different functions of a model (it
does).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bn_jax.inference.fold_chain import BATCH_NORMS, LINEAR, Fate, Link, Report, fold_chain

GETS, RETURNS = "bn_jax.fold: gets ", "bn_jax.fold: returns "


class Follows(NamedTuple):
    """What a trace shows, by the names that the layers' marks bear.

    Attributes:
        after: layer -> the layer that its result goes into.
        before: layer -> the layer that it gets the result of, also where that goes elsewhere too.
        uses: how often each layer is called.
    """

    after: dict[str, str]
    before: dict[str, str]
    uses: Counter[str]


def mark_call(name: str, call: Any, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
    """The result of a layer's call, both marked, for `read_marks`."""
    if inputs:
        inputs = (checkpoint_name(inputs[0], GETS + name), *inputs[1:])
    return checkpoint_name(call(*inputs, **options), RETURNS + name)


def trace(function: Any, *arguments: Any) -> Follows:
    """What the marks show that are made in a function.

    Args:
        function: what makes them.
        arguments: of any structure; arrays in it, or shapes and dtypes, are traced, and whatever
            else there is, such as train=False, is passed on.

    >>> def net(x, train):
    ...     x = mark_call("conv", lambda x: x * 2, [x], {})
    ...     return mark_call("norm", lambda x: x - x.mean(), [x], {}) + train
    >>> trace(net, jax.ShapeDtypeStruct((3,), "float32"), 1).after
    {'conv': 'norm'}
    """
    leaves, structure = jax.tree.flatten(arguments)
    traced = [n for n, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def run(*arrays: Any) -> Any:
        filled = dict(enumerate(leaves)) | dict(zip(traced, arrays, strict=True))
        return function(*jax.tree.unflatten(structure, list(filled.values())))

    follows = Follows({}, {}, Counter())
    read_marks(jax.make_jaxpr(run)(*(leaves[n] for n in traced)).jaxpr, follows)
    return follows


def read_marks(jaxpr: Any, follows: Follows) -> None:
    """Add to follows what the operations of a jaxpr show, and those inside of them."""
    consumers = Counter(id(v) for eqn in jaxpr.eqns for v in eqn.invars)
    consumers.update(id(v) for v in jaxpr.outvars)
    returned: dict[int, str] = {}
    for eqn in jaxpr.eqns:
        mark = str(eqn.params.get("name", "")) if eqn.primitive.name == "name" else ""
        if mark.startswith(RETURNS):
            returned[id(eqn.outvars[0])] = mark.removeprefix(RETURNS)
            follows.uses[mark.removeprefix(RETURNS)] += 1
        elif mark.startswith(GETS) and id(eqn.invars[0]) in returned:
            name, before = mark.removeprefix(GETS), returned[id(eqn.invars[0])]
            follows.before[name] = before
            if consumers[id(eqn.invars[0])] == 1:
                follows.after[before] = name
        for inner in inner_jaxprs(eqn.params):
            read_marks(inner, follows)


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs in an operation's parameters: of jit, checkpoint, scan, cond."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def fold_followers(
    links: dict[str, Link], follows: Follows
) -> tuple[dict[str, dict[str, Array]], list[str], Report]:
    """Fold the batch norms among layers that follow each other.

    Args:
        links: the layers by the names in their marks, in the order of the model.
        follows: what goes into what.

    Returns:
        New values of linear layers, the batch norms that are gone, and what became of all of them.
    """
    values: dict[str, dict[str, Array]] = {}
    gone: list[str] = []
    fates: dict[str, Fate] = {}
    followers = set(follows.after.values())
    for name in links:
        if name in followers and links[name].uses == 1:
            continue
        # What is used twice ends a chain and starts another, or else a chain might never end.
        names = [name]
        while names[-1] in follows.after and (links[names[-1]].uses == 1 or len(names) == 1):
            names.append(follows.after[names[-1]])
        first = before(links, follows.before.get(name))
        folding = fold_chain([first, *(links[name] for name in names), OTHER])
        values |= {names[n - 1]: new for n, new in folding.values.items()}
        gone += [names[n - 1] for n in folding.gone]
        norms = [name for name in names if type(links[name].layer) in BATCH_NORMS]
        fates |= zip(norms, folding.fates, strict=True)
    return values, gone, Report(fates[name] for name in links if name in fates)


def before(links: dict[str, Link], name: str | None) -> Link:
    """What is before a chain, as reasons name it: nothing to fold into."""
    if name is None:
        return OTHER
    if links[name].uses > 1 and type(links[name].layer) in LINEAR:
        return links[name]
    kind = f"{type(links[name].layer).__name__}, whose result goes elsewhere too"
    return Link(name, SimpleNamespace(__name__=kind), {})


OTHER = Link("other", SimpleNamespace(__name__="operations"), {})
