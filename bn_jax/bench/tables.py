"""The tables of recorded results: which figures stand in which rows and columns."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bn_jax.bench.pivot import Fields, Pivot, cell, markdown
from bn_jax.bench.records import select

OURS, ACCURATE = "bn_jax", "flax, `use_fast_variance=False`"
PEERS = {"flax": "flax", ACCURATE: "flax accurate", "haiku": "haiku", "torch": "torch"}
SHAPES = [[60, 100], [1024, 1024], [128, 28, 28, 32], [32, 14, 14, 256], [64, 56, 56, 64]]
LARGE = [[256, 112, 112, 64], [256, 28, 28, 512]]
MACHINES = {"CPU": {"file": "cpu"}, "H100": {"file": "h100"}}
DTYPES = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}}


def ratios(suite: str, names: Mapping[str, str], unit: str, ours: str) -> dict[str, Any]:
    """Rows of a table of times: ours in a unit, and the others in multiples of it."""
    first = {f"**{OURS}, in {unit}**": ({"suite": suite, "contender": OURS}, ours)}
    others = {
        label: ({"suite": suite, "contender": name}, "{ratio}") for label, name in names.items()
    }
    return first | others


def layer(machine: str, dtype: str, shapes: Sequence[list[int]], without: str = "") -> Pivot:
    """The time of a layer, by shape."""
    names = {label: name for label, name in PEERS.items() if name != without}
    if not (machine == "cpu" and dtype == "bfloat16"):
        names |= {"8 traversals of memory": "8 traversals"}
    fields = {"file": machine, "what": "step", "dtype": dtype}
    columns = {"×".join(map(str, shape)): {"shape": shape, **fields} for shape in shapes}
    corner = f"H100, {dtype}" if machine == "h100" else dtype
    return Pivot(corner, columns, ratios("layer", names, "µs", "{microseconds}"))


def speed() -> list[str]:
    """The README's table: geometric means over the larger shapes."""
    columns = {
        f"{machine} {dtype}": ({**fields, "dtype": dtype}, shapes)
        for machine, fields, shapes in (
            ("CPU", MACHINES["CPU"], SHAPES[1:]),
            ("H100", MACHINES["H100"], LARGE),
        )
        for dtype in DTYPES
    }
    rows = [
        [label, *(geometric_mean(name, fields, shapes) for fields, shapes in columns.values())]
        for label, name in PEERS.items()
    ]
    return markdown(["", *columns], rows)


def geometric_mean(contender: str, fields: Fields, shapes: Sequence[list[int]]) -> str:
    """The geometric mean of a contender's ratios over shapes."""
    layer = {"suite": "layer", "what": "step", "contender": contender, **fields}
    found = [select({**layer, "shape": shape}) for shape in shapes]
    if not all(found):
        return "–"
    return f"{math.prod(float(r['ratio']) for r in found if r) ** (1 / len(found)):.2f}"


def of_suite(suite: str, text: str, rows: Mapping[str, Fields]) -> dict[str, tuple[Fields, str]]:
    """Rows of one suite that show the same figures."""
    return {label: ({"suite": suite, **fields}, text) for label, fields in rows.items()}


STACK = {"what": "stack of 20", "image": 32}
BEFORE = {"file": "cpu_2026_11_28", "what": "core before its rewriting"}
MLP = {name: {"model": "mlp", **fields} for name, fields in MACHINES.items()}
CONVOLUTIONS = {name: {"model": name, "file": "cpu"} for name in ("cnn", "tower")}
LOOPS = ratios(
    "train-step",
    {"flax and optax": "flax", "torch": "torch"},
    "steps per second",
    "{steps_per_second}",
)
TRAFFIC = {
    f"**{OURS}**": OURS,
    "flax (inaccurate by default)": "flax",
    ACCURATE: "flax accurate",
    "torch `SyncBatchNorm` (all-gather)": "torch",
}

TABLES: dict[str, Pivot] = {
    "environment": Pivot(
        "",
        {"CPU": {"file": "cpu"}, "GPU": {"file": "h100"}},
        {
            label: ({"suite": "environment"}, text)
            for label, text in {
                "device": "{device}",
                "jax, flax": "{jax}, {flax}",
                "torch": "{torch}",
                "haiku": "{dm-haiku}",
                "equinox, keras": "{equinox}, {keras}",
            }.items()
        },
    ),
    "accuracy": Pivot(
        "",
        MACHINES,
        of_suite(
            "accuracy",
            "{error}",
            {
                f"**{OURS}**": {"contender": OURS},
                "flax, haiku": {"contender": "flax"},
                ACCURATE: {"contender": "flax accurate"},
                "equinox": {"contender": "equinox"},
                "keras": {"contender": "keras"},
                "torch": {"contender": "torch"},
            },
        ),
    ),
    "layer-cpu-float32": layer("cpu", "float32", SHAPES),
    "layer-cpu-bfloat16": layer("cpu", "bfloat16", SHAPES, without="haiku"),
    "layer-runs": Pivot(
        "",
        {f"run {n}" + " (the table)" * (n == 1): {"run": n} for n in (1, 2, 3, 4)},
        of_suite(
            "layer runs",
            "{geometric_mean}",
            {
                label: {"contender": PEERS.get(label, label)}
                for label in ("flax", ACCURATE, "haiku", "equinox", "torch")
            },
        ),
    ),
    "rewritten": Pivot(
        "",
        {"×".join(map(str, shape)): {"shape": shape, **BEFORE} for shape in SHAPES},
        of_suite("layer", "{ratio}", DTYPES),
    ),
    "layer-h100-float32": layer("h100", "float32", [*SHAPES[:2], SHAPES[4], *LARGE]),
    "layer-h100-bfloat16": layer("h100", "bfloat16", [*SHAPES[:2], SHAPES[4], *LARGE]),
    "memory": Pivot(
        "memory, in multiples of flax's (below 1: less)",
        DTYPES,
        of_suite(
            "memory",
            "{of_flax}",
            {
                "one layer, CPU and H100": {"file": "cpu", "what": "layer"},
                "20 × (convolution, norm, ReLU), CPU": {"file": "cpu", **STACK},
                "the same on the H100": {"file": "h100", **STACK},
                "the same on the H100, images of 56×56": {"file": "h100", **STACK, "image": 56},
            },
        ),
    ),
    "loop": Pivot("time per step, in multiples of ours", MLP, LOOPS),
    "loop-convolutions": Pivot("time per step, in multiples of ours", CONVOLUTIONS, LOOPS),
    "loop-allocator": Pivot(
        "",
        {"mlp": {"model": "mlp", "file": "cpu"}, **CONVOLUTIONS},
        ratios(
            "train-step without allocator",
            {"flax and optax, in multiples of it": "flax"},
            "µs",
            "{microseconds}",
        ),
    ),
    "compile": Pivot(
        "in multiples of flax's (above 1: slower)",
        {"CPU": {"file": "cpu_2026_11_28"}, "H100": {"file": "h100"}},
        of_suite(
            "compile",
            "{of_flax}",
            {
                "one layer": {"what": "layer"},
                "20 × (convolution, norm, ReLU)": {"what": "stack of 20"},
            },
        ),
    ),
    "fold": Pivot(
        "",
        {"unfolded": {"contender": "unfolded"}},
        of_suite(
            "fold", "{ratio}", {w: {"what": w} for w in ("jitted", "op by op", "compilation")}
        ),
    ),
    "pallas": Pivot(
        "",
        {
            f"{what}, {name}": {"what": what, "contender": name}
            for what in ("forward", "backward")
            for name in ("Pallas", "XLA")
        },
        of_suite(
            "pallas",
            "{reads_of_a_copy}",
            {
                f"{dtype}, " + "×".join(map(str, shape)): {"dtype": dtype, "shape": shape}
                for dtype in DTYPES
                for shape in LARGE
            },
        ),
    ),
}


def traffic() -> list[str]:
    """The table of traffic, whose columns show different figures."""
    head = ["", "floats of a layer with C channels: forward; backward", "collectives"]
    head += ["8 devices: MB, messages", "256 devices", "4,096 devices"]
    rows = []
    for label, name in TRAFFIC.items():
        fields = {"suite": "scaling", "contender": name}
        cells = [cell({**fields, "devices": 8}, text) for text in ("{floats}", "{collectives}")]
        cells += [cell({**fields, "devices": n}, "{megabytes}, {messages}") for n in (8, 256, 4096)]
        rows.append([label, *cells])
    return markdown(head, rows)
