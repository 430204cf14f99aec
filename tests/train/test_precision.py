"""Half precision computes; parameters and statistics stay float32, and an overflow does no harm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.train import loop, state
from bn_jax.train.build import build_model
from bn_jax.train.config import TrainConfig
from bn_jax.train.experiment import Interrupted, run_experiment
from bn_jax.train.loop import run_chunk, train
from bn_jax.train.progress import begin, careful, is_finite
from bn_jax.train.state import init_state
from bn_jax.train.step import make_train_step
from tests.train.test_experiment import quiet
from tests.train.test_resume import assert_same_end, stop_after

pytestmark = pytest.mark.usefixtures("lenient")
stop_after = stop_after

SMALL = {"hidden": (8,), "batch_size": 20, "steps": 12, "evaluate_every": 4, "norm": "batch"}
HALVES = ("bfloat16", "float16")


def parts(**options):
    return TrainConfig(**SMALL | options), "batch"


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("model", ["mlp", "cnn", "tower"])
def test_what_is_half_and_what_is_not(model, precision, digits):
    """Every layer's output is; what a step keeps is not, nor is the loss. Traced, not compiled."""
    sizes = {"model": model, "filters": 2, "blocks": 1} if model != "mlp" else {}
    config, arm = parts(precision=precision, micro_batches=2, **sizes)
    images, labels = digits.train_images[:20], digits.train_labels[:20].astype(np.int32)

    def step():
        old = init_state(config, arm, images)
        return old, *make_train_step(config, arm)(old, images, labels)

    old, new, loss = jax.eval_shape(step)
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (old, new)]
    assert kinds[0] == kinds[1]
    floats = [x for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype.name for x in [*floats, loss]} == {"float32"}

    def outputs():
        model = build_model(config, arm)
        variables = model.init(jax.random.key(0), jnp.zeros((20, 28, 28)), train=False)
        options = {"capture_intermediates": True, "mutable": ["intermediates", "batch_stats"]}
        return model.apply(variables, jnp.zeros((20, 28, 28)), train=True, **options)

    assert {x.dtype.name for x in jax.tree.leaves(jax.eval_shape(outputs)[1]["intermediates"])} == {
        precision
    }


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALVES)
def test_steps_are_those_of_float32_but_for_rounding(precision, digits):
    """Also with a loss scale of 65,536, and in parts."""
    ends = [
        list(train(*parts(precision=p, micro_batches=2), digits))[-1][0].state
        for p in (precision, "float32")
    ]
    # Twelve steps of a rate of .15 with gradients of at most 1, rounded to 2⁻⁹ of themselves.
    for a, b in zip(*(jax.tree.leaves(end.params) for end in ends), strict=True):
        np.testing.assert_allclose(a, b, atol=12 * 0.15 * 2**-9)


def overflowing(config, arm, images, scale):
    start = init_state(config, arm, images[:2])
    return start._replace(loss_scale=start.loss_scale.replace(scale=jnp.float32(scale)))


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"micro_batches": 2, "optimizer": "adam"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_step_that_overflows_is_undone_and_halves_the_scale(options, digits):
    config, arm = parts(precision="float16", **options)
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels, jnp.int32)
    start = overflowing(config, arm, images, 2.0**20)
    step = make_train_step(config, arm)
    got, finite = run_chunk(
        step, begin(start), images, labels, steps=20, batch_size=20, take=careful(20)
    )
    assert finite
    assert 0 < got.bad < 10
    assert got.good + got.bad == 20
    # In parts, each that overflows halves it: one or both.
    halved = np.log2(2.0**20 / got.state.loss_scale.scale)
    assert got.bad <= halved <= got.bad * config.micro_batches
    assert is_finite(got.state)
    first, _ = run_chunk(
        step, begin(start), images, labels, steps=1, batch_size=20, take=careful(20)
    )
    assert first.bad == 1
    for name in ("params", "batch_stats", "opt_state"):
        for a, b in zip(
            *(jax.tree.leaves(getattr(s, name)) for s in (start, first.state)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_an_overflow_that_a_smaller_scale_answers_ends_nothing(digits):
    """Of more overflows in a row than bad steps may be. Weights beyond float16 are no such case."""
    config, arm = parts(precision="float16")
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels, jnp.int32)
    start = overflowing(config, arm, images, 2.0**24)
    step, options = make_train_step(config, arm), {"batch_size": 20, "take": careful(2)}
    got, _ = run_chunk(step, begin(start), images, labels, steps=20, **options)
    assert got.bad > 2
    assert got.good + got.bad == 20
    assert not got.diverged(2)
    scale = start.loss_scale.replace(scale=jnp.float32(2.0**6))
    start = start._replace(params=jax.tree.map(lambda leaf: leaf + 1e6, start.params))
    got, _ = run_chunk(
        step, begin(start._replace(loss_scale=scale)), images, labels, steps=20, **options
    )
    # Six halvings lead to the least scale, of 1; two more bad steps are a divergence.
    assert (got.state.loss_scale.scale, got.bad, got.step) == (1, 8, 8)
    assert got.diverged(2)


@pytest.mark.slow
def test_the_scale_grows_again(digits):
    """Flax doubles it after a number of good steps, here 4."""
    config, arm = parts(precision="float16")
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels, jnp.int32)
    start = overflowing(config, arm, images, 2.0**4)
    start = start._replace(loss_scale=start.loss_scale.replace(growth_interval=4))
    got, _ = run_chunk(
        make_train_step(config, arm), begin(start), images, labels, steps=12, batch_size=20
    )
    assert got.state.loss_scale.scale == 2.0**6


@pytest.mark.slow
def test_it_goes_on_to_the_byte_amid_overflows(tmp_path, on_digits, stop_after, monkeypatch):
    """The scale is in the checkpoint: stopped after 2 of 12 steps, of which 8 or so overflow."""
    monkeypatch.setattr(loop, "steps_per_call", lambda *_: 2)
    monkeypatch.setattr(state, "LOSS_SCALE", 2.0**24)
    options = SMALL | {"precision": "float16", "checkpoint_every": 4}
    whole, parts = (TrainConfig(run_dir=tmp_path / name, **options) for name in ("whole", "parts"))
    run_experiment(whole, quiet())
    stop_after(2)
    with pytest.raises(Interrupted, match="stopped at step 2"):
        run_experiment(parts, quiet())
    stop_after(100)
    run_experiment(parts, quiet(), resume=tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert '"bad_steps": 4' in lines[1]
