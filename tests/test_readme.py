"""The README and the pages that it links say what is true.

Their Python blocks run, their commands are accepted, their links lead somewhere, and their tables
of versions and transformations are those that are tested.
"""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import tyro

from bn_jax.bench.suites import SUITES
from bn_jax.hints import check_used
from bn_jax.reproduce.claims import CLAIMS
from bn_jax.train.config import TrainConfig
from bn_jax.train.scoring import Statistics
from tests.core.test_transforms import CASES, TRANSFORMS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / ".docs").glob("*.md")), ROOT / "bn_jax" / "bench" / "RESULTS.md"]
OTHERS = [ROOT / ".github" / "CONTRIBUTING.md", ROOT / "bn_jax" / "CHANGELOG.md"]


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path):
    """What a page asks to be typed: lines of its shell blocks, and code in its text."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:bn-jax|pip|pytest) [^`]+)`", text)
    return [part.split("#")[0].strip() for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_blocks_run_in_order(path, lenient):
    """A page's blocks share their names, as in one session."""
    names = {}
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), names)
    if path == README:
        assert names["accuracy"] == 1


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1500


def test_its_two_commands_are_the_ones_that_are_promised():
    assert [block.strip() for block in blocks(README, "bash")][1:] == [
        'pip install -e ".[train]" && bn-jax train',
        'pip install -e ".[test]" && pytest',
    ]


def bn_jax_commands():
    found = {c: name(path) for path in PAGES + OTHERS for c in commands(path)}
    return [pytest.param(c, id=f"{page}: {c}") for c, page in found.items() if "bn-jax " in c]


@pytest.mark.parametrize("command", bn_jax_commands())
def test_commands_are_accepted(command):
    program, verb, *flags = shlex.split(command)
    assert program == "bn-jax"
    if verb == "bench":
        assert not flags or (flags[0] == "--suite" and flags[1] in SUITES)
    elif verb == "evaluate":
        assert flags[:1] in ([], ["RUN"])
        if flags[1:]:
            flag, value = flags[1:]
            assert value.isdecimal() if flag == "--step" else flag == "--statistics"
            assert flag == "--step" or value in get_args(Statistics)
    elif verb == "conform":
        assert not any(flag.startswith("-") for flag in flags)
    elif verb == "reproduce":
        assert set(flags) <= {"--quick", *CLAIMS}
    elif verb == "explain":
        assert flags == ["RUN"]
    elif "--resume" in flags:
        assert (verb, flags) == ("train", ["--resume", "RUN"])
    elif verb == "--version":
        assert not flags
    elif flags != ["--help"]:
        assert verb == "train" or (verb == "sweep" and flags[:1] in ([], ["--over"]))
        config = tyro.cli(TrainConfig, args=flags)
        assert (config == TrainConfig()) == (not flags)
        check_used(config.unused, flags)


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=name)
def test_only_a_checkout_is_installed(path):
    """There is no package on an index yet."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = extras["optional-dependencies"].keys()
    for command in commands(path):
        if command.startswith("pip install"):
            assert re.fullmatch(r'pip install (-e \.|-e "\.\[[\w,]+\]")', command)
            assert set(re.findall(r"\w+", command.partition("[")[2])) <= known


def test_nothing_else_says_to_install_from_an_index():
    """Extras may be named in pyproject.toml, where they include each other."""
    search = ["git", "grep", "-nE", r"pip install ['\"]?bn-jax|bn-jax\["]
    places = ["--", ":!pyproject.toml", ":!tests/test_readme.py"]
    found = subprocess.run([*search, *places], cwd=ROOT, capture_output=True, text=True)
    assert not found.stdout, found.stdout


def anchor(title):
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=name)
def test_links_lead_somewhere(path):
    for target, _, section in re.findall(r"\]\(([^)#]*)(#?)([^)]*)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert section in map(anchor, titles), f"{target}#{section}"


def test_every_page_is_linked_from_the_readme():
    for path in PAGES[1:]:
        assert f"({name(path)}" in README.read_text()


def test_the_table_of_transformations_is_the_tests():
    """What joins the tests joins the page."""
    text = (ROOT / ".docs" / "transformations.md").read_text()
    assert f"{len(TRANSFORMS)} transformations × {len(CASES)} kinds" in text
    kinds = re.search(r"The kinds are: (.*?)\. The tests", text, re.DOTALL)[1].split(",")
    assert len(kinds) == len(CASES)


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
    rows = r"^\| (jax|flax|optax) \| ([\d.]+) "
    for page in (README, ROOT / ".docs" / "install.md"):
        found = dict(re.findall(rows, page.read_text(), re.MULTILINE))
        assert found == {name: oldest[name] for name in ("jax", "flax", "optax")}


def test_the_package_carries_what_a_user_needs():
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for path in ("LICENSE", "CHANGELOG.md", "py.typed"):
        assert f"bn_jax/{path}" in names
    top = {name.split("/")[0] for name in names if not name.startswith(".")}
    assert top == {"pyproject.toml", "bn_jax", "tests", "notebooks", "README.md"}
