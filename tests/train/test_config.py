"""A configuration: what it refuses and how it says so, and its way to JSON and back."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bn_jax.train.config import TrainConfig

positive = st.integers(1, 10**6)
rates = st.floats(0, 1e6)
ranges = {
    "data_dir": st.none() | st.text(min_size=1).map(Path),
    "hidden": st.lists(positive, max_size=4).map(tuple),
    "filters": positive,
    "blocks": st.integers(0, 50),
    "init_std": st.none() | st.floats(0, 1e6, exclude_min=True),
    "decay": st.floats(0, 1) | st.just((0.9, 0.99)),
    "renorm": st.none() | st.just((3.0, 5.0)),
    "epsilon": rates,
    "learning_rate": rates,
    "weight_decay": rates,
    "batch_size": positive,
    "micro_batches": st.integers(1, 8),
    "group_size": st.none() | st.integers(2, 64),
    "classes_per_batch": st.none() | st.integers(1, 10),
    "steps": st.integers(0, 10**9),
    "max_bad_steps": positive,
    "seed": st.integers(0, 2**32 - 1001),
    "seeds": st.integers(1, 1000),
    "evaluate_every": positive,
    "checkpoint_every": positive,
    "run_dir": st.none() | st.text(min_size=1).map(Path),
    "devices": st.none() | st.integers(1, 64),
    "tensorboard": st.booleans(),
    "over": st.just(()) | st.just(("learning-rate=0.1,0.2", "epsilon=1e-3")),
}
hints = typing.get_type_hints(TrainConfig)
choices = {name: typing.get_args(kind) for name, kind in hints.items() if name not in ranges}


@st.composite
def configs(draw):
    """Any configuration that makes sense."""
    fields = {name: draw(values) for name, values in ranges.items()}
    fields |= {name: draw(st.sampled_from(values)) for name, values in choices.items()}
    if fields["model"] == "tower":
        fields["placement"] = "pre-activation"
    if fields["norm"] != "none":
        fields["batch_size"] = max(2, fields["batch_size"])
    fields["batch_size"] *= fields["micro_batches"] * (fields["devices"] or 1)
    if fields["renorm"]:
        fields["group_size"] = None
    for name in ("group_size", "classes_per_batch"):
        fields["batch_size"] *= fields[name] or 1
    return TrainConfig(**fields)


@given(configs())
def test_to_json_and_back(config):
    text = config.to_json()
    assert TrainConfig.from_json(text) == config
    assert json.loads(text).keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    hash(config)


def test_the_default_is_the_papers_experiment():
    config = TrainConfig()
    assert (config.dataset, config.model, config.hidden) == ("mnist", "mlp", (100, 100, 100))
    assert (config.steps, config.batch_size, config.activation) == (50_000, 60, "sigmoid")
    assert (config.placement, config.arms) == ("pre-activation", ("batch", "none"))
    assert config.binarization != "none"
    assert TrainConfig.from_json("{}") == config


@pytest.mark.parametrize(
    ("norm", "arms"), [("both", ("batch", "none")), ("batch", ("batch",)), ("none", ("none",))]
)
def test_arms(norm, arms):
    assert TrainConfig(norm=norm).arms == arms


OUT_OF_RANGE = [
    *((name, "other", "must be one of") for name in choices),
    *(
        (n, 0, "a positive")
        for n in (
            *("filters", "batch_size", "evaluate_every", "checkpoint_every", "max_bad_steps"),
        )
    ),
    ("filters", 1.0, "a positive integer"),
    ("batch_size", -60, "a positive integer"),
    ("micro_batches", 0, "a positive integer"),
    ("micro_batches", 7, "a divisor of --batch-size 60"),
    ("micro_batches", 60, "at most 30 for --batch-size 60"),
    ("classes_per_batch", 0, "a positive integer"),
    ("classes_per_batch", 7, "a divisor of --batch-size 60"),
    ("group_size", 0, "a positive integer"),
    ("group_size", True, "a positive integer"),
    ("group_size", 61, "at most 60, for --batch-size 60"),
    ("group_size", 1, "such that no example is left alone"),
    ("group_size", 59, "such that no example is left alone"),
    ("devices", 0, "a positive integer"),
    ("devices", 2.0, "a positive integer"),
    ("batch_size", True, "a positive integer"),
    ("blocks", -1, "at least 0"),
    ("steps", -1, "at least 0"),
    ("steps", 0.5, "an integer"),
    ("seed", -1, "from 0 to 4294967295"),
    ("seed", 2**32, "from 0 to 4294967295"),
    ("seeds", 0, "a positive integer"),
    ("seeds", 2**32 + 1, "at most 4294967296 for --seed 0"),
    ("hidden", (100, 0), "positive integers"),
    ("hidden", (100, 1.5), "positive integers"),
    ("hidden", 100, "positive integers"),
    *((n, -0.1, "at least 0") for n in ("learning_rate", "epsilon", "weight_decay")),
    *((n, float("nan"), "finite") for n in ("learning_rate", "epsilon", "weight_decay")),
    *(
        (n, float("inf"), "finite")
        for n in ("learning_rate", "epsilon", "weight_decay", "init_std")
    ),
    ("init_std", 0.0, "positive"),
    ("init_std", -1.0, "positive"),
    ("decay", -0.1, "between 0 and 1"),
    ("decay", 1.1, "between 0 and 1"),
    ("decay", float("nan"), "between 0 and 1"),
    ("decay", (0.9, 1.5), "between 0 and 1"),
    *(("decay", decays, "different numbers") for decays in ((), (0.9, 0.9))),
    *(("renorm", limits, "R_MAX of at least 1") for limits in ((0.5, 5), (3, -1), (3,), 3)),
    *(
        ("over", over, "NAME=NUMBER,NUMBER,… with NAME one of learning-rate, init-std, decay, ")
        for over in (
            *("learning-rate=1", ("learning-rate",), ("learning-rate=a",), ("seed=1",), (3,)),
            *(("decay=0.1", "decay=0.2"), ("decay=0.1,0.1",), ("decay=",), 5),
        )
    ),
    ("tensorboard", 1, "True or False"),
    ("data_dir", "a folder", "path"),
    ("run_dir", 5, "path"),
]


@pytest.mark.parametrize(("name", "value", "rule"), OUT_OF_RANGE)
def test_a_value_out_of_range(name, value, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        TrainConfig(**{name: value})
    # Several values as a command line has them.
    several = isinstance(value, tuple) and value
    shown = " ".join(map(str, value)) if several else repr(value)
    assert str(caught.value).startswith(f"--{name.replace('_', '-')} {shown}: must be ")


def test_every_field_has_a_value_that_is_refused():
    assert {name for name, *_ in OUT_OF_RANGE} == {f.name for f in dataclasses.fields(TrainConfig)}


def test_the_limits_themselves_are_in_range():
    zeros = {"learning_rate": 0, "epsilon": 0, "weight_decay": 0, "decay": 0, "steps": 0, "seed": 0}
    TrainConfig(**zeros, blocks=0)
    TrainConfig(decay=1, seed=2**32 - 1, filters=1, evaluate_every=1, checkpoint_every=1, hidden=())


def test_the_tower_has_one_placement():
    with pytest.raises(
        ValueError, match=r"--placement 'input': must be pre-activation for the tower"
    ):
        TrainConfig(model="tower", placement="input")


def test_one_example_has_no_variance():
    with pytest.raises(ValueError, match=r"--batch-size 1: must be at least 2 with batch norm"):
        TrainConfig(batch_size=1)
    # Without batch norm, and where each feature has a map of values, it may be one.
    TrainConfig(batch_size=1, norm="none")
    TrainConfig(batch_size=1, model="tower")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": 8}, "--batch-size 60: must be a multiple of --devices 8, e.g. 56 or 64"),
        (
            {"devices": 8, "micro_batches": 3},
            "--batch-size 60: must be a multiple of --devices 8 times --micro-batches 3, "
            "e.g. 48 or 72",
        ),
        ({"devices": 100}, "--batch-size 60: must be a multiple of --devices 100, e.g. 100"),
    ],
)
def test_devices_have_equal_parts_of_a_batch(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainConfig(**fields)
    # One example each is enough: the statistics are those of the whole batch.
    TrainConfig(batch_size=8, devices=8)


def test_parts_without_batch_norm_may_be_single():
    for options in ({"norm": "none"}, {"model": "tower"}):
        TrainConfig(micro_batches=60, **options)
        TrainConfig(group_size=1, **options)


def test_groups_lie_within_parts():
    message = "--group-size 16: must be at most 15, for --batch-size 60 in --micro-batches 4"
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(group_size=16, micro_batches=4)
    TrainConfig(group_size=15, micro_batches=4)


@pytest.mark.parametrize(
    "fields",
    [
        *({name: None} for name in ("learning_rate", "hidden", "steps", "dataset", "decay")),
        *({name: "1"} for name in ("learning_rate", "steps", "seed", "epsilon", "init_std")),
        *({name: True} for name in ("learning_rate", "steps", "init_std", "decay")),
        *({name: [1]} for name in ("learning_rate", "steps", "model", "data_dir")),
        {"hidden": "100"},
        {"hidden": 100},
        {"hidden": [[100]]},
        {"hidden": {"100": 1}},
        {"run_dir": 5},
        {"model": {}},
    ],
    ids=str,
)
def test_json_of_the_wrong_type(fields):
    ((name, _),) = fields.items()
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} .*: must be "):
        TrainConfig.from_json(json.dumps(fields))


def test_json_with_an_unknown_field():
    with pytest.raises(ValueError, match=r"unknown field 'momentum'"):
        TrainConfig.from_json('{"steps": 5, "momentum": 0.9}')


@pytest.mark.parametrize("text", ["", "{", "steps: 5", '{"steps": 5', "[1]x"])
def test_what_is_not_json(text):
    with pytest.raises(ValueError, match=r"line 1 column"):
        TrainConfig.from_json(text)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"steps"'])
def test_json_that_is_no_object(text):
    with pytest.raises(ValueError, match=r"not a JSON object"):
        TrainConfig.from_json(text)


def test_seeds_are_consecutive():
    assert list(TrainConfig(seed=3, seeds=2).all_seeds) == [3, 4]
    assert list(TrainConfig().all_seeds) == [0]
    message = "--seeds 2: must be at most 1 for --seed 4294967295"
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(seed=2**32 - 1, seeds=2)


def test_what_the_paper_describes_and_what_it_leaves_open():
    for options in ({}, {"learning_rate": 1.0, "seeds": 5, "steps": 9, "init_std": 0.1}):
        assert TrainConfig(**options).is_papers
    for options in ({"hidden": (100,)}, {"optimizer": "adam"}, {"classes_per_batch": 1}):
        assert not TrainConfig(**options).is_papers
    for options in ({"binarization": "none"}, {"renorm": (3, 5)}):
        assert not TrainConfig(**options).is_papers


def test_every_value_of_a_grid_is_checked():
    with pytest.raises(ValueError, match=r"^--decay 1.5: must be between 0 and 1$"):
        TrainConfig(over=("decay=0.5,1.5",))


def test_the_cells_of_a_grid():
    config = TrainConfig(over=("learning-rate=0.1,1e-2", "init_std=0.5"), seeds=2, seed=7)
    cells = [(run.learning_rate, run.init_std, run.seed) for run in config.runs]
    assert cells == [(0.1, 0.5, 7), (0.1, 0.5, 8), (0.01, 0.5, 7), (0.01, 0.5, 8)]
    assert config.names == [(0, 7), (0, 8), (1, 7), (1, 8)]
    assert config.runs[3] == TrainConfig(learning_rate=0.01, init_std=0.5, seed=8)
    assert TrainConfig().runs == [TrainConfig()]


def test_one_run_carries_several_averages():
    """The decays change nothing else; with renorm they do, and each has a run of its own."""
    rates = {"over": ("learning-rate=0.1,0.2",), "seeds": 2}
    for config in (
        TrainConfig(decay=(0.9, 0.5), **rates),
        TrainConfig(over=("decay=0.9,0.5", *rates["over"]), seeds=2),
    ):
        assert config.axes == {"learning_rate": (0.1, 0.2), "decay": (0.9, 0.5)}
        assert (len(config.runs), config.decays, len(config.grid)) == (4, 2, 4)
        assert config.names[:5] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]
        assert config.grid[2] == {"learning_rate": 0.2, "decay": 0.9}
    config = TrainConfig(over=("r-max=1,3", "decay=0.9,0.5"), renorm=(2, 5))
    assert (config.decays, len(config.runs)) == (1, 4)
    assert [run.renorm for run in config.runs] == [(1, 5), (1, 5), (3, 5), (3, 5)]
    with pytest.raises(ValueError, match=r"--renorm 0.5 0.0: must be R_MAX of at least 1"):
        TrainConfig(over=("r-max=0.5",))
    config = TrainConfig(decay=(0.9, 0.5), renorm=(3, 5))
    assert [run.decay for run in config.runs] == [0.9, 0.5]
    assert (config.decays, config.names) == (1, [(0, 0), (1, 0)])


def test_devices_share_the_runs_where_these_are_a_multiple():
    assert TrainConfig(seeds=8, devices=8).splits_runs  # though 60 is no multiple of 8
    assert not TrainConfig(seeds=6, devices=4).splits_runs
    assert not TrainConfig(devices=2).splits_runs
    assert not TrainConfig(decay=(0.1, 0.2), devices=2).splits_runs
