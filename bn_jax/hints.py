"""What a command line that cannot work was probably meant to say."""

import contextlib
import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

OTHER_NAMES = {
    "--learning-rate": "lr rate learningrate step-size eta alpha",
    "--batch-size": "bs batch batchsize minibatch mini-batch-size train-batch-size",
    "--micro-batches": "accumulate accumulation-steps gradient-accumulation-steps grad-accum",
    "--steps": "iterations iters num-iterations num-steps max-steps n-steps updates",
    "--hidden": "layers units width hidden-size hidden-sizes hidden-layers hidden-units",
    "--model": "arch architecture net network",
    "--activation": "nonlinearity act",
    "--filters": "channels features feature-maps",
    "--blocks": "depth num-blocks",
    "--init-std": "std sigma init-scale init",
    "--norm": "bn batch-norm batchnorm normalization no-bn no-norm",
    "--decay": "bn-momentum bn-decay ema-decay",
    "--epsilon": "eps bn-eps bn-epsilon",
    "--group-size": "ghost ghost-batch-size virtual-batch-size",
    "--optimizer": "opt optim",
    "--optimizer adam": "adam",
    "--schedule": "scheduler lr-schedule lr-scheduler learning-rate-schedule lr-decay",
    "--weight-decay": "wd l2",
    "--max-bad-steps": "max-consecutive-errors skip-nonfinite",
    "--seeds": "num-seeds n-seeds repeats",
    "--seed": "random-seed random-state rng key",
    "--dataset": "data",
    "--data-dir": "data-path data-folder data-root root",
    "--evaluate-every": "eval-every eval-interval eval-steps test-every val-every",
    "--checkpoint-every": "save-every save-steps save-interval checkpoint-interval ckpt-every",
    "--run-dir": "out output output-dir out-dir outdir save-dir log-dir logdir workdir name",
    "--device gpu": "gpu cuda use-gpu",
    "--device cpu": "cpu no-cuda no-gpu",
    "--devices": "gpus num-devices n-devices num-gpus ngpus",
    "--process-id": "rank node-rank",
    "--processes": "world-size num-processes nproc nnodes",
    "--coordinator": "master-addr coordinator-address",
    "--output-dir": "out output out-dir outdir save-dir run-dir",
    "--turns": "repeats repeat reps runs trials rounds n",
    "--suite": "only benchmark test",
}
"""A flag, and what other programs call it."""

EPOCHS = ("epochs", "epoch", "num-epochs", "n-epochs", "max-epochs")
FOLDERS = "run run-dir path folder checkpoint"
WITHOUT_FLAGS = {
    "evaluate": (FOLDERS, "the run's folder", "RUN"),
    "explain": (FOLDERS, "the run's folder", "RUN"),
    "conform": ("target targets module function name", "the batch norm", "MODULE:FUNCTION"),
    "reproduce": ("claim claims only name", "the claim", "CLAIM"),
}
"""What a command takes without a flag: how others may call it, what it is, how help shows it."""

TRAINING_IMAGES = 60_000  # of each data set


def describe_flags(command: Callable[..., Any]) -> list[str]:
    """The flags of a command."""
    return [flag_of(name) for name in fields_of(command)]


def fields_of(command: Callable[..., Any]) -> dict[str, Any]:
    """The field behind each flag of a command, with its type.

    The command is a function whose parameters may be dataclasses of more fields; some are
    positional and have no flag.
    """
    from tyro.conf import Positional

    (positional,) = typing.get_args(Positional[int])[1:]
    kinds, marked = (typing.get_type_hints(command, include_extras=some) for some in (False, True))
    fields: dict[str, Any] = {}
    for name in inspect.signature(command).parameters:
        if dataclasses.is_dataclass(kinds[name]):
            group = typing.get_type_hints(kinds[name])
            fields |= {field.name: group[field.name] for field in dataclasses.fields(kinds[name])}
        elif positional not in typing.get_args(marked[name])[1:]:
            fields[name] = kinds[name]
    return fields


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def given_flags(arguments: Iterable[str]) -> dict[str, str]:
    """Each flag of a command line, written as help writes it, and the words that follow it."""
    given: dict[str, list[str]] = {"": []}
    words = given[""]
    for argument in arguments:
        if is_flag(argument):
            name, equals, value = argument.partition("=")
            words = given[name.replace("_", "-")] = [value] if equals else []
        else:
            words.append(argument)
    return {name: " ".join(words) for name, words in given.items() if name}


def is_flag(argument: str) -> bool:
    """Whether an argument is a flag, not a value: -1 and -1e-3 are values."""
    try:
        float(argument)
    except ValueError:
        return argument.startswith("-")
    return False


def check_command(name: str, commands: Sequence[str]) -> None:
    """Raise a ValueError with a hint unless there is such a command."""
    if name in commands:
        return
    known = ", ".join(commands)
    if is_flag(name):
        raise ValueError(f"{name}: a command comes first, one of {known}")
    near = nearest(name, commands)
    hint = f"did you mean {near}?" if near else f"choose one of {known}"
    raise ValueError(f"{name}: no such command; {hint}")


def check_flags(command: str, known: Sequence[str], arguments: Sequence[str]) -> None:
    """Raise a ValueError with a hint at the first flag that a command does not have."""
    given = given_flags(arguments)
    if "--help" in given or "-h" in given:
        return
    for flag, value in given.items():
        if flag not in known:
            shown = f"{flag} {value}".strip()
            hint = guess(flag, value, known, given) or f"see bn-jax {command} --help"
            names, what, shown_as = WITHOUT_FLAGS.get(command, ("", "", ""))
            if flag.lstrip("-") in names.split():
                hint = f"give {what} without a flag: bn-jax {command} {shown_as}"
            raise ValueError(f"{shown}: bn-jax {command} has no {flag}; {hint}")


def guess(flag: str, value: str, known: Sequence[str], given: Mapping[str, str]) -> str | None:
    """What was meant by a flag that is not known, or None."""
    name = flag.lstrip("-").lower()
    if name in EPOCHS and "--steps" in known:
        return explain_epochs(value, given.get("--batch-size", "60"))
    if name == "momentum" and "--decay" in known:
        return (
            "did you mean --optimizer momentum (SGD with momentum 0.9), or batch norm's --decay "
            "(the weight of the past; torch's momentum is 1 - decay)?"
        )
    meant = other_name(name, known) or nearest(f"--{name}", known)
    return f"did you mean {meant}?" if meant else None


def other_name(name: str, known: Sequence[str]) -> str | None:
    """The known flag that other programs call by this name, or None."""
    flags = (meant for meant, others in OTHER_NAMES.items() if name in others.split())
    return next((flag for flag in flags if flag.split()[0] in known), None)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that is spelt most like a word, or None."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def explain_epochs(value: str, batch_size: str) -> str:
    """Epochs as steps, of this batch size."""
    try:
        steps = max(TRAINING_IMAGES / int(batch_size), 1)
        total = math.ceil(steps * float(value or "1"))
    except (ValueError, OverflowError, ZeroDivisionError):
        return "did you mean --steps? 1 epoch is 1,000 steps of 60 examples"
    return f"did you mean --steps {total}? 1 epoch is {steps:,.0f} steps of {batch_size} examples"


def read_integer(text: str) -> int:
    """The integer that a text writes out; raises a ValueError with a hint for one like 1e5."""
    try:
        return int(text)
    except ValueError:
        hint = ""
        with contextlib.suppress(ValueError, OverflowError):
            value = float(text.replace(",", ""))
            hint = f"; did you mean {int(value)}?" if value.is_integer() else ""
        raise ValueError(f"{text} is not a whole number{hint}") from None


def read_number(text: str) -> float:
    """The number that a text writes out; raises a ValueError for other texts."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text} is not a number, such as 0.1 or 1e-3") from None


def check_used(unused: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Raise a ValueError if the command line sets what would change nothing.

    Args:
        unused: the fields without effect, each with the reason.
        arguments: the command line.
    """
    given = given_flags(arguments)
    for name, reason in unused.items():
        if flag_of(name) in given:
            raise ValueError(f"{flag_of(name)}: has no effect with {reason}")
