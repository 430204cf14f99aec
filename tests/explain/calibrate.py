"""Does `explain` name the right cause? Planted faults and healthy runs, on networks and seeds.

    python -m tests.explain.calibrate          the seeds of the figures
    python -m tests.explain.calibrate --tune   the seeds on which thresholds were set

A training leaves more than its last weights: statistics by averages of several decays, those of an
earlier step, weights that were averaged. Faults are planted by combining what does not belong
together. Each is looked at in two ways: in functions, and in the layers of flax (the dense network
in flax.linen, the convolutional one in flax.nnx).
"""

import sys
from collections import defaultdict
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from bn_jax.core.moments import Moments
from bn_jax.core.state import BatchNormState
from bn_jax.explain import explain
from bn_jax.explain.models import explain_linen, explain_nnx
from tests.explain.networks import (
    PART,
    SHAPES,
    Linen,
    Nnx,
    Weights,
    forward,
    images_and_labels,
    linen_variables,
    train,
)

# assert_independent finds the first, moments alone do not. The second shows where the examples of
# batches can be mixed, or have one value each. The third is none: 4 images have 196 values.
NOT_SEEN = {
    ("train flag left on", "functional"),
    ("pure batches", "conv", "functional"),
    ("batches of 4", "conv"),
}
TUNE, REPORT = range(5), range(100, 105)
STEPS, SIZE, LOOKED_AT = 400, 32, 50


class Case(NamedTuple):
    """What is given to `explain`, and the cause that it should name; None for nothing wrong."""

    cause: str | None
    weights: Weights
    states: list[BatchNormState]
    rows: np.ndarray
    size: int = SIZE
    epsilon: float = 1e-5
    momentum: float = 0.99
    brighter: float = 0.0
    flag: bool = False


def any_rows(seed, batches, size, labels):
    return np.random.default_rng(seed).integers(0, len(labels), (batches, size))


def two_digits(seed, batches, size, labels):
    """Half a batch is one digit, the other half another."""
    random, order = np.random.default_rng(seed), np.argsort(labels, kind="stable")
    begins = np.searchsorted(labels[order], np.arange(11))
    pairs = [random.choice(10, 2, replace=False) for _ in range(batches)]
    return np.array(
        [
            np.concatenate(
                [order[random.integers(begins[d], begins[d + 1], size // 2)] for d in pair]
            )
            for pair in pairs
        ]
    )


def cases(kind, seeds, images, labels):
    """Name -> one case per seed: the faults, and runs that are healthy."""

    def learn(rates, draw=any_rows, size=SIZE, **options):
        rows = np.stack([draw(seed, STEPS, size, labels) for seed in seeds])
        rates = np.broadcast_to(np.float32(rates), (STEPS,))
        return train(kind, seeds, images, labels, rows, rates, **options)

    falling = optax.cosine_decay_schedule(1.0, STEPS)(np.arange(STEPS))
    healthy, large = learn(0.3 * falling), learn(0.3 * falling, size=128)
    slow, few = learn(0.02), learn(0.1 * falling, size=4)
    fast = learn(1.0)
    pure, dim = learn(0.3 * falling, two_digits), learn(0.3 * falling, epsilon=30.0)
    dead = learn(0.3 * falling, dead=[3])
    found = defaultdict(list)
    for n, seed in enumerate(seeds):
        rows = any_rows(seed + 1000, LOOKED_AT, SIZE, labels)
        end, stats = healthy[-1][n], healthy[-1][n].states
        right = Case(None, end.weights, stats["kept"], rows)

        def add(name, cause, case=right, **changes):
            found[name].append(case._replace(cause=cause, **changes))

        def other(trained, which="kept", **changes):
            return {"weights": trained.weights, "states": trained.states[which]} | changes

        add("healthy", None)
        add(
            "healthy, larger batches",
            None,
            **other(large[-1][n], size=128, rows=any_rows(seed + 1000, LOOKED_AT, 128, labels)),
        )
        add("healthy, small constant rate", None, **other(slow[-1][n]))
        add("NaN in the state", "not finite", states=spoiled(stats["kept"], np.nan))
        add("NaN in the weights", "data not finite", weights=scaled(end.weights, np.nan))
        add(
            "never updated",
            "never updated",
            states=[BatchNormState(0 * s.mean, 0 * s.var + 1, s.count) for s in stats["kept"]],
        )
        add(
            "pure batches",
            "pure batches",
            **other(pure[-1][n], rows=two_digits(seed + 1000, LOOKED_AT, SIZE, labels)),
        )
        add("few steps from 0 and 1", "young average", **other(healthy[0][n], "from 0 and 1"))
        add("momentum of 0.01", "inverted momentum", states=stats["momentum 0.01"], momentum=0.01)
        add("momentum of 0.1", "inverted momentum", states=stats["momentum 0.1"], momentum=0.1)
        add("stale", "other weights", **other(fast[-1][n], states=fast[0][n].states["kept"]))
        add(
            "another model",
            "other weights",
            states=healthy[-1][(n + 1) % len(seeds)].states["kept"],
        )
        add(
            "averaged weights",
            "averaged weights",
            **other(fast[-1][n], weights=fast[-1][n].averaged),
        )
        add("high constant rate", "lagging average", **other(fast[100 // PART - 1][n]))
        add("brighter evaluation", "shifted evaluation", brighter=0.4)
        add("large epsilon", "epsilon", **other(dim[-1][n], epsilon=30.0))
        add(
            "batches of 4",
            "small batches",
            **other(few[-1][n], size=4, rows=any_rows(seed + 1000, LOOKED_AT, 4, labels)),
        )
        large_feature = [
            s if i == 0 else BatchNormState(s.mean * factors(s), s.var * factors(s) ** 2, s.count)
            for i, s in enumerate(stats["kept"])
        ]
        add(
            "exploding feature",
            "exploding features",
            weights=scaled(end.weights, 1e5),
            states=large_feature,
        )
        add("dead feature", "dead features", **other(dead[-1][n]))
        add("train flag left on", "train flag", flag=True)
    return found


def factors(state):
    values = np.ones_like(state.mean)
    values[3] = 1e5
    return values


def spoiled(states, value):
    var = np.array(states[1].var)
    var[3] = value
    return [states[0], states[1]._replace(var=var)]


def scaled(weights, by):
    kernel = np.array(weights.kernels[1])
    kernel[..., 3] *= by
    return weights._replace(kernels=[weights.kernels[0], kernel, *weights.kernels[2:]])


@jax.jit
def moments(weights, batches, epsilon):
    return jax.lax.map(lambda x: forward(weights, x, epsilon)[1], batches)


@cache
def linen(**options):
    """In training mode, and as it is evaluated: rightly, and with the train flag left on."""
    model = Linen(**options)

    def trains(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    return trains, {
        False: lambda variables, x: model.apply(variables, x, train=False),
        True: lambda variables, x: trains(variables, x)[0],
    }


def trains_nnx(model, x):
    return model(x)


EVALUATES_NNX = {
    False: lambda model, x: model(x, use_running_average=True),
    True: lambda model, x: model(x),
}


def first_verdict(kind, case, api, images, test_images):
    """The first cause that is named, or None."""
    batches, test = images[case.rows], None
    if case.brighter or case.cause is None:
        test = test_images[: case.rows.size].reshape(batches.shape)
        test = test * (1 - case.brighter) + case.brighter
    if api == "functional":

        def see(some):
            layers = jax.device_get(moments(case.weights, some, case.epsilon))
            for b in range(LOOKED_AT):
                yield {str(i): Moments(*(p[b] for p in m[:3])) for i, m in enumerate(layers)}

        states = {str(i): state for i, state in enumerate(case.states)}
        evaluated = None if test is None else see(test)
        options = {"batch_size": case.size, "epsilon": case.epsilon}
        report = explain(states, see(batches), evaluated, **options)
    elif kind == "dense":
        trains, evaluates = linen(epsilon=case.epsilon, momentum=case.momentum)
        evaluate = evaluates[case.flag] if case.flag else None
        variables = linen_variables(case.weights, case.states)
        report = explain_linen(trains, variables, batches, test, evaluate=evaluate)
    else:
        evaluate = EVALUATES_NNX[case.flag] if case.flag else None
        model = Nnx(case.weights, case.states, epsilon=case.epsilon, momentum=case.momentum)
        report = explain_nnx(trains_nnx, model, batches, test, evaluate=evaluate)
    return (report.findings[0].cause.name if report.findings else None), report


def calibrate(seeds, show=lambda *_: None):
    """Name -> (how often the first verdict was right, of how many), over networks and ways."""
    images, labels, test_images = images_and_labels()
    results = defaultdict(dict)
    for kind in SHAPES:
        for name, some in cases(kind, seeds, images, labels).items():
            for api in ("functional", "linen" if kind == "dense" else "nnx"):
                if {(name, kind), (name, api), (name, kind, api)} & NOT_SEEN:
                    continue
                right = 0
                for case in some:
                    said, report = first_verdict(kind, case, api, images, test_images)
                    right += said == case.cause
                    if said != case.cause:
                        show(kind, api, name, said, report)
                results[name][kind, api] = right, len(some)
    return results


def table(results):
    """As in the documentation."""
    ways = list(dict.fromkeys(way for row in results.values() for way in row))
    lines = ["| planted | " + " | ".join(" ".join(w) for w in ways) + " |"]
    lines.append("|---" * (1 + len(ways)) + "|")
    for name, row in results.items():
        cells = [f"{row[w][0]}/{row[w][1]}" if w in row else "–" for w in ways]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = TUNE if "--tune" in sys.argv else REPORT

    def show(*words: Any) -> None:
        print(*words[:4])
        if "--verbose" in sys.argv:
            print(words[4], *(r.likeness for r in words[4].rows.values()), "\n")

    print(table(calibrate(chosen, show)))
