"""`bn-jax bench`, `conform` and `reproduce`: what this batch norm, another one and papers claim."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bn_jax import hints
from bn_jax.commands import console
from bn_jax.train.flags import unset


def bench(
    suite: Literal[
        "all", "accuracy", "layer", "train-step", "memory", "compile", "scaling", "fold"
    ] = "all",
    turns: int = 15,
    output_dir: Annotated[Path | None, unset("PATH", "runs/bench-DATE-TIME")] = None,
    data_dir: Annotated[Path | None, unset("PATH", "fetch them once, and cache them")] = None,
) -> None:
    """Measure speed, accuracy and memory against other installed libraries.

    - Prints tables and which bars (targets) bn_jax meets, and leaves bench.json and
      plots in a folder.
    - accuracy: errors against float64; exits with 1 where bn_jax misses its bars
    - layer, train-step: the time of one layer, and of a step of training
    - memory, compile: what the backward pass keeps, and how long compiling takes
    - scaling: how much devices send to each other in a step of training
    - fold: the time that folding saves at inference

    Args:
        suite: What to measure.
        turns: How many times each library is timed, in suites that measure time.
        output_dir: Where to leave the results.
        data_dir: A folder with MNIST's four files, for train-step.
    """
    from datetime import datetime

    from bn_jax.bench.allocator import keep_memory

    if turns < 2:
        raise ValueError(f"--turns {turns}: must be at least 2, for quartiles")
    unused = {}
    if suite in ("accuracy", "memory", "scaling"):
        unused["turns"] = f"--suite {suite}, which measures no time"
    if suite not in ("all", "train-step"):
        unused["data_dir"] = f"--suite {suite}; only train-step uses it"
    hints.check_used(unused, sys.argv[2:])
    keep_memory()  # before what takes long, which would be loaded twice
    with console.stdout.status("loading JAX"):
        from bn_jax.bench.suites import SUITES, run_suites

    folder = output_dir or Path("runs") / f"bench-{datetime.now():%Y-%m-%d-%H%M%S}"
    suites = SUITES if suite == "all" else (suite,)
    if not run_suites(
        suites, turns=turns, data_dir=data_dir, folder=folder, console=console.stdout
    ):
        raise SystemExit(1)


def conform(
    targets: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="MODULE:FUNCTION...",
            help_behavior_hint="(one or more, e.g. bn_jax.conform.example)",
        ),
    ] = (),
) -> None:
    """Try any batch norm, of any framework, on inputs with known results.

    - Says what is right, and names the known bug where something is wrong.
    - Whatever else it offers is tried too; .docs/conform.md says what that can be.
    - Exits with 0 if nothing is wrong, 1 if something is or nothing could be tried,
      2 if a target cannot be imported or called.

    Args:
        targets: A function, or a module or object that has a function batch_norm. Its code is run.
    """
    from bn_jax.conform.report import try_targets

    if not targets:
        raise ValueError("conform: name a batch norm, e.g. my_module:batch_norm")
    if not try_targets(targets, console.stdout):
        raise SystemExit(1)


def reproduce(
    claims: tyro.conf.Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="[CLAIM [CLAIM ...]]", help_behavior_hint="(all)"),
        ]
    ] = (),
    quick: bool = False,
    seeds: int = 5,
    output_dir: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("runs/reproduce"),
    data_dir: Annotated[Path | None, unset("PATH", "fetch them once, and cache them")] = None,
) -> None:
    """Run the claims of the papers on batch norm, and write a report.

    - Claims are figure-1, robustness, learning-rates, population, renormalization,
      shift, noise, weight-decay, batch-size, tower and covariate-shift.
    - Leaves report.html, report.md, results.json and figures in a folder.
    - Takes about an hour on 2 cores. Claims that the folder has results of are
      not run again; after Ctrl-C, the same command goes on.

    Args:
        claims: Which claims to run.
        quick: Take a few steps of 2 seeds only, to see that everything works.
        seeds: Runs of each method.
        output_dir: Where to leave the report, and what it is made of.
        data_dir: A folder with MNIST's four files.
    """
    if seeds < 2:
        raise ValueError(f"--seeds {seeds}: must be at least 2, for intervals")
    if quick:
        hints.check_used({"seeds": "--quick, which takes 2"}, sys.argv[2:])
    with console.stdout.status("loading JAX"):
        from bn_jax.reproduce.run import QUICK_SEEDS, reproduce_claims

    folder = output_dir / "quick" if quick else output_dir
    options = {"seeds": QUICK_SEEDS if quick else seeds, "quick": quick, "data_dir": data_dir}
    reproduce_claims(claims, folder=folder, console=console.stdout, **options)
