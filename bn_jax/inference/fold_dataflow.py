"""Finds which layers follow each other in a model that is not a Sequential, by tracing it.

The order of layers is in the model's code, so the model is traced once on the shapes of an example
input. Every layer that matters marks its input and its result. If the marked result of one layer
is used by nothing but the marked input of another, the second layer follows the first. So a norm
follows the conv of a residual block, also if the two are called in different functions; but not if
the conv's result is also added to something else.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bn_jax.inference.fold_chain import (
    BATCH_NORMS,
    LINEAR,
    ChainLayer,
    FoldReport,
    FoldResult,
    fold_chain,
)

INPUT, RESULT = "bn_jax.fold: input of ", "bn_jax.fold: result of "
AFFINE = "bn_jax.fold: scale or bias in the call of "


class Dataflow(NamedTuple):
    """Which layer's result is which other layer's input, by the names in their marks.

    Attributes:
        after: layer -> the only layer that uses its result.
        before: layer -> the layer whose result is its input, even if others use that result too.
        uses: how often each layer is called.
        affine: the batch norms that get scale or bias in their call.

    >>> flow = Dataflow({"conv": "norm"}, {"norm": "conv"}, Counter(["conv", "norm"]), set())
    >>> flow.after["conv"]
    'norm'
    """

    after: dict[str, str]
    before: dict[str, str]
    uses: Counter[str]
    affine: set[str]


def mark_call(name: str, call: Any, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
    """Call a layer, with marks on its input and its result for `read_marks`."""
    if inputs:
        inputs = (checkpoint_name(inputs[0], INPUT + name), *inputs[1:])
    y = call(*inputs, **options)
    if any(options.get(part) is not None for part in ("scale", "bias")):
        y = checkpoint_name(y, AFFINE + name)
    return checkpoint_name(y, RESULT + name)


def trace(function: Any, *arguments: Any) -> Dataflow:
    """The dataflow between the marked calls in a function.

    Args:
        function: calls layers through `mark_call`.
        *arguments: of the function, any trees. Arrays in them, or shapes and dtypes, are traced;
            other leaves, such as train=False, are passed on.

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

    dataflow = Dataflow({}, {}, Counter(), set())
    read_marks(jax.make_jaxpr(run)(*(leaves[n] for n in traced)).jaxpr, dataflow)
    return dataflow


def read_marks(jaxpr: Any, dataflow: Dataflow) -> None:
    """Add the marks in a jaxpr, and in the jaxprs inside it, to dataflow."""
    consumers = Counter(id(v) for eqn in jaxpr.eqns for v in eqn.invars)
    consumers.update(id(v) for v in jaxpr.outvars)
    returned: dict[int, str] = {}
    for eqn in jaxpr.eqns:
        mark = str(eqn.params.get("name", "")) if eqn.primitive.name == "name" else ""
        if mark.startswith(RESULT):
            returned[id(eqn.outvars[0])] = mark.removeprefix(RESULT)
            dataflow.uses[mark.removeprefix(RESULT)] += 1
        elif mark.startswith(AFFINE):
            dataflow.affine.add(mark.removeprefix(AFFINE))
        elif mark.startswith(INPUT) and id(eqn.invars[0]) in returned:
            name, before = mark.removeprefix(INPUT), returned[id(eqn.invars[0])]
            dataflow.before[name] = before
            if consumers[id(eqn.invars[0])] == 1:
                dataflow.after[before] = name
        for inner in inner_jaxprs(eqn.params):
            read_marks(inner, dataflow)


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an operation's parameters, as in jit, checkpoint, scan and cond."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def fold_followers(
    layers: dict[str, ChainLayer], dataflow: Dataflow
) -> tuple[dict[str, dict[str, Array]], list[str], FoldReport]:
    """Fold batch norms in every chain of layers that follow each other.

    Args:
        layers: the layers by the names in their marks, in the order of the model.
        dataflow: which follows which.

    Returns:
        New parameters of linear layers, the names of folded batch norms, and the report.
    """
    values: dict[str, dict[str, Array]] = {}
    gone: list[str] = []
    results: dict[str, FoldResult] = {}
    followers = set(dataflow.after.values())
    layers = {
        name: layer._replace(affine_in_call=name in dataflow.affine)
        for name, layer in layers.items()
    }
    for name in layers:
        if name in followers and layers[name].uses == 1:
            continue
        # A layer used twice ends its chain and starts another; otherwise a chain could be a loop.
        names = [name]
        while names[-1] in dataflow.after and (layers[names[-1]].uses == 1 or len(names) == 1):
            names.append(dataflow.after[names[-1]])
        first = layer_before(layers, dataflow.before.get(name))
        folding = fold_chain([first, *(layers[name] for name in names), OTHER])
        values |= {names[n - 1]: new for n, new in folding.values.items()}
        gone += [names[n - 1] for n in folding.gone]
        norms = [name for name in names if type(layers[name].module) in BATCH_NORMS]
        results |= zip(norms, folding.results, strict=True)
    return values, gone, FoldReport(results[name] for name in layers if name in results)


def layer_before(layers: dict[str, ChainLayer], name: str | None) -> ChainLayer:
    """A stand-in for what comes before a chain, to be named in reasons; not to be folded into."""
    if name is None:
        return OTHER
    if layers[name].uses > 1 and type(layers[name].module) in LINEAR:
        return layers[name]
    kind = f"{type(layers[name].module).__name__}, whose result goes elsewhere too"
    return ChainLayer(name, SimpleNamespace(__name__=kind), {})


OTHER = ChainLayer("other", SimpleNamespace(__name__="operations"), {})
