"""The settings of a training run, in the groups that `bn-jax train --help` shows.

Each field is a flag. Its line under Attributes is the flag's help, its type says what it takes, and
a `Must` which values.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from bn_jax.train.flags import (
    FOLDER,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    Must,
    as_tuple,
    integer_from,
    is_tuple,
    number_from,
    unset,
)


def are_limits(value: Any) -> bool:
    """Whether a value is what Batch Renormalization's limits may be."""
    return is_tuple(value, number_from(0)) and len(value) == 2 and value[0] >= 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What to train on.

    Attributes:
        dataset: The data set; both have 60,000 training and 10,000 test images, 28 by 28.
        data_dir: A folder with the data set's four files, or with Keras' mnist.npz.
        binarization: How grey levels become the paper's binary input. threshold: above 127 is 1.
            stochastic: drawn anew at each step with the grey level as probability. none: not at
            all, grey levels stay between 0 and 1.
    """

    dataset: Literal["mnist", "fashion-mnist"] = "mnist"
    data_dir: Annotated[Path | None, FOLDER, unset("PATH", "downloaded once, then cached")] = None
    binarization: Literal["threshold", "stochastic", "none"] = "threshold"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network.

    Attributes:
        model: mlp: the paper's fully connected network. cnn: two convolutions and a dense layer.
            tower: AlphaGo Zero's residual tower with its policy head.
        hidden: Sizes of the mlp's hidden layers.
        filters: Feature maps of the cnn's first convolution, or of every convolution of the tower.
        blocks: Residual blocks of the tower.
        activation: The nonlinearity g of mlp and cnn. The tower always uses relu.
        init_std: Standard deviation of the Gaussian initial weights.
        precision: What the network computes in; parameters and statistics are always float32.
            float16 scales the loss (dynamically), so that small gradients do not vanish.
    """

    model: Literal["mlp", "cnn", "tower"] = "mlp"
    hidden: Annotated[
        tuple[int, ...],
        Must("positive integers, e.g. 100 100 100", lambda sizes: is_tuple(sizes, integer_from(1))),
        arg(metavar="INT [INT ...]"),
    ] = (100, 100, 100)
    filters: Annotated[int, POSITIVE] = 16
    blocks: Annotated[int, NOT_NEGATIVE] = 2
    activation: Literal["sigmoid", "relu", "tanh"] = "sigmoid"
    init_std: Annotated[
        float | None,
        Must("finite and positive", number_from(5e-324)),
        unset("FLOAT", "0.04 for the mlp; √(2/inputs) for cnn and tower, He et al."),
    ] = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizationSettings:
    """Batch normalization.

    Attributes:
        norm: With batch norm, without it (none), or one run of each to compare.
        placement: Where batch norm stands in mlp and cnn. pre-activation: z = g(BN(Wu)), the
            paper's choice. input: z = g(W BN(u) + b), which its section 3.2 rejects.
        average: The moving average of the statistics that inference uses.
        decay: Weight of the past in an ema or debiased average. Several values make as many
            averages of the same training, each with a row in the table.
        epsilon: Added to the variance.
        group_size: Ghost batch norm: normalize each group of this many examples by its own
            statistics.
        renorm: Batch Renormalization: correct the batch towards the running statistics, up to
            the limits r_max and d_max, e.g. 3 5.
        statistics: What evaluations normalize by. running: the moving average. population: 200
            training batches, measured anew (Algorithm 2 of the paper). batch: each test batch.
    """

    norm: Literal["both", "batch", "none"] = "both"
    placement: Literal["pre-activation", "input"] = "pre-activation"
    average: Literal["ema", "debiased", "cumulative"] = "debiased"
    decay: Annotated[
        float | tuple[float, ...],
        Must("between 0 and 1", lambda value: all(map(number_from(0, 1), as_tuple(value)))),
        Must(
            "different numbers", lambda value: 0 < len(as_tuple(value)) == len({*as_tuple(value)})
        ),
        arg(metavar="FLOAT [FLOAT ...]", help_behavior_hint="(default: 0.99)"),
    ] = 0.99
    epsilon: Annotated[float, RATE] = 1e-5
    group_size: Annotated[int | None, POSITIVE, unset("INT", "the whole batch")] = None
    renorm: Annotated[
        tuple[float, float] | None,
        Must("R_MAX of at least 1 and D_MAX of at least 0, e.g. 3 5", are_limits),
        unset("R_MAX D_MAX", "none"),
    ] = None
    statistics: Literal["running", "population", "batch"] = "running"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the weights are learned.

    Attributes:
        optimizer: Plain SGD, SGD with momentum (0.9), or Adam.
        learning_rate: The (initial) learning rate.
        schedule: The learning rate stays constant, falls to zero along a cosine, or falls
            exponentially to a hundredth.
        weight_decay: Decoupled weight decay, times the learning rate. Spares biases and batch
            norm's scale.
        batch_size: Examples per step.
        classes_per_batch: Draw each batch from this many classes only, with equally many examples
            of each.
        micro_batches: Split each batch into this many parts, one after the other, to save memory.
            Each part is normalized by its own statistics; the running statistics move once per
            step.
        steps: Training steps; 1,000 steps of 60 examples are one epoch.
        max_bad_steps: A step whose loss or gradients are not finite is undone. After this many in
            a row, the network has diverged, and its training ends. Steps that make float16's loss
            scale smaller do not count.
        seed: Seed of the initial weights, the order of examples and the stochastic input.
        seeds: Train with this many seeds at once: --seed and those that follow it. Results are
            then means with 95% intervals.
    """

    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    learning_rate: Annotated[float, RATE] = 0.15
    schedule: Literal["constant", "cosine", "exponential"] = "constant"
    weight_decay: Annotated[float, RATE] = 0.0
    batch_size: Annotated[int, POSITIVE] = 60
    classes_per_batch: Annotated[int | None, POSITIVE, unset("INT", "all examples in turn")] = None
    micro_batches: Annotated[int, POSITIVE] = 1
    steps: Annotated[int, NOT_NEGATIVE] = 50_000
    max_bad_steps: Annotated[int, POSITIVE] = 100
    # JAX keeps 32 bits of a seed: above, two seeds would be one.
    seed: Annotated[int, Must("an integer from 0 to 4294967295", integer_from(0, 2**32))] = 0
    seeds: Annotated[int, POSITIVE] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is kept, and where to compute.

    Attributes:
        evaluate_every: Steps between evaluations on the test set.
        checkpoint_every: Steps between checkpoints, rounded up to evaluations. The last step
            always has one.
        keep: Which checkpoints remain. newest: the newest two. best: these and the one of the
            highest test accuracy, as a mean over seeds; a seed that has diverged counts with its
            last one. all: every one.
        tensorboard: Write TensorBoard's event files too, in the run's folder.
        run_dir: The run's folder, new or empty.
        device: Where to compute; auto is JAX's own choice.
        devices: Split each batch over this many devices; its statistics stay those of the whole
            batch. On a CPU the devices are virtual.
    """

    evaluate_every: Annotated[int, POSITIVE] = 500
    checkpoint_every: Annotated[int, POSITIVE] = 5_000
    keep: Literal["newest", "best", "all"] = "newest"
    tensorboard: Annotated[bool, Must("True or False", lambda value: type(value) is bool)] = False
    run_dir: Annotated[Path | None, FOLDER, unset("PATH", "runs/DATE-TIME")] = None
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    devices: Annotated[int | None, POSITIVE, unset("INT", "1, or all of several processes")] = None
