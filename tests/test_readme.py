"""The README says what is true: its blocks run, its versions are those that are tested."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import tyro

from bn_jax.bench.suites import SUITES
from bn_jax.train.config import TrainConfig
from tests.core.test_transforms import CASES, TRANSFORMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(lenient):
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["new_state"].mean.shape == (64,)
    assert names["loss"] > 0


def test_its_two_commands_are_the_ones_that_are_promised():
    commands = [block.strip() for block in blocks("bash")]
    assert commands[:2] == [
        'pip install -e ".[train]" && bn-jax train',
        'pip install -e ".[test]" && pytest',
    ]


@pytest.mark.parametrize("command", [c for b in blocks("bash")[2:] for c in b.splitlines()])
def test_its_other_commands_are_accepted(command):
    program, verb, *flags = command.split()
    assert program == "bn-jax"
    if verb == "bench":
        assert flags[0] == "--suite"
        assert flags[1] in SUITES
    else:
        assert verb == "train"
        assert tyro.cli(TrainConfig, args=flags) != TrainConfig()


def test_its_table_of_transformations_is_the_tests():
    """What joins the tests joins the README."""
    assert f"{len(TRANSFORMS)} transformations × {len(CASES)} kinds" in README
    kinds = re.search(r"for each of: (.*?)\. The tests", README, re.DOTALL)[1].split(",")
    assert len(kinds) == len(CASES)


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_supported_versions_are_one_story():
    """pyproject.toml, the oldest versions that are tested, and the README's table agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lower = dict(
        requirement.split(">=")
        for requirement in [*project["dependencies"], *(r for e in extras.values() for r in e)]
        if ">=" in requirement and "[" not in requirement
    )
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    for package, version in oldest.items():
        if package != "jaxlib":
            assert version.startswith(lower[package]), package
    rows = dict(re.findall(r"^\| (jax|flax|optax) \| ([\d.]+) ", README, re.MULTILINE))
    assert rows == {name: oldest[name] for name in ("jax", "flax", "optax")}


def test_the_package_carries_what_a_user_needs():
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in ("LICENSE", "CHANGELOG.md", "py.typed"):
        assert f"bn_jax/{name}" in names
    top = {name.split("/")[0] for name in names if not name.startswith(".")}
    assert top == {"pyproject.toml", "bn_jax", "tests", "notebooks", "README.md"}
