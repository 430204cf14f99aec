"""The settings of a training run, in the groups that `bn-jax train --help` shows.

Each field is a flag, and its line under Attributes is the flag's help.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg


def unset(metavar: str, default: str) -> Any:
    """How help shows a flag whose default is None: what it takes, and what None stands for."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What to train on.

    Attributes:
        dataset: The data set; both have 60,000 training and 10,000 test images, 28 by 28.
        data_dir: A folder with the data set's four files.
        binarization: How grey levels become the paper's binary input. threshold: above 127 is 1.
            stochastic: drawn anew at each step with the grey level as probability. none: not at
            all, grey levels stay between 0 and 1.
    """

    dataset: Literal["mnist", "fashion-mnist"] = "mnist"
    data_dir: Annotated[Path | None, unset("PATH", "fetch them once, and cache them")] = None
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
    """

    model: Literal["mlp", "cnn", "tower"] = "mlp"
    hidden: Annotated[tuple[int, ...], arg(metavar="INT [INT ...]")] = (100, 100, 100)
    filters: int = 16
    blocks: int = 2
    activation: Literal["sigmoid", "relu", "tanh"] = "sigmoid"
    init_std: Annotated[
        float | None, unset("FLOAT", "0.04 for the mlp; √(2/inputs) for cnn and tower, He et al.")
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizationSettings:
    """Batch normalization.

    Attributes:
        norm: With batch norm, without it (none), or one run of each to compare.
        placement: Where batch norm stands in mlp and cnn. pre-activation: z = g(BN(Wu)), the
            paper's choice. input: z = g(W BN(u) + b), which its section 3.2 rejects.
        average: The moving average of the statistics that inference uses.
        decay: Weight of the past in an ema or debiased average.
        epsilon: Added to the variance.
        group_size: Ghost batch norm: normalize each group of this many examples by its own
            statistics.
    """

    norm: Literal["both", "batch", "none"] = "both"
    placement: Literal["pre-activation", "input"] = "pre-activation"
    average: Literal["ema", "debiased", "cumulative"] = "debiased"
    decay: float = 0.99
    epsilon: float = 1e-5
    group_size: Annotated[int | None, unset("INT", "the whole batch")] = None


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
        micro_batches: Split each batch into this many parts, one after the other, to save memory.
            Each part is normalized by its own statistics; the running statistics move once per
            step.
        steps: Training steps; 1,000 steps of 60 examples are one epoch.
        max_bad_steps: A step whose loss or gradients are not finite is undone. After this many in
            a row, the arm has diverged and ends.
        seed: Seed of the initial weights, the order of examples and the stochastic input.
        seeds: Train with this many seeds at once: --seed and those that follow it. Results are
            then means with 95% intervals.
    """

    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    learning_rate: float = 0.15
    schedule: Literal["constant", "cosine", "exponential"] = "constant"
    weight_decay: float = 0.0
    batch_size: int = 60
    micro_batches: int = 1
    steps: int = 50_000
    max_bad_steps: int = 100
    seed: int = 0
    seeds: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is kept, and where to compute.

    Attributes:
        evaluate_every: Steps between evaluations on the test set.
        checkpoint_every: Steps between checkpoints, rounded up to evaluations. The last step
            always has one.
        run_dir: The run's folder, new or empty.
        device: Where to compute; auto is JAX's own choice.
        devices: Split each batch over this many devices; its statistics stay those of the whole
            batch. On a CPU the devices are virtual.
    """

    evaluate_every: int = 500
    checkpoint_every: int = 5_000
    run_dir: Annotated[Path | None, unset("PATH", "runs/DATE-TIME")] = None
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    devices: Annotated[int | None, unset("INT", "1, or all those of several processes")] = None
