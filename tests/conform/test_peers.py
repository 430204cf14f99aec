"""What `bn-jax conform` says of the libraries that are installed is what our pages say."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from bn_jax.conform import judge, report
from bn_jax.conform.find import find

pytestmark = [pytest.mark.usefixtures("lenient"), pytest.mark.optimized]

PAGE = Path(__file__).parents[2] / ".docs" / "conform.md"
NAMES = {  # the row of the page -> the entry, its module, and the distribution that has a version
    "flax": ("flax", "flax", "flax"),
    "flax, `use_fast_variance=False`": ("flax_accurate", "flax", "flax"),
    "flax.nnx": ("nnx", "flax", "flax"),
    "flax.nnx, `dtype=bfloat16`": ("nnx_bfloat16", "flax", "flax"),
    "haiku": ("haiku", "haiku", "dm-haiku"),
    'equinox, `mode="batch"`': ("equinox", "equinox", "equinox"),
    "keras": ("keras", "keras", "keras"),
    "torch": ("torch", "torch", "torch"),
}


def tried(entry):
    return judge.try_all(find(f"bn_jax.bench.entries:{entry}"))


def tried_group(entry, group):
    candidate = find(f"bn_jax.bench.entries:{entry}")
    pairs = ((call, v) for v in judge.load() if v.group == group for call in v.calls)
    return [judge.try_one(candidate, call, vector) for call, vector in pairs]


def test_ours_is_right_however_large_the_mean_is():
    assert {f.level for f in tried_group("bn_jax", "large mean")} == {"right"}


@pytest.mark.slow
def test_ours_is_right_in_everything():
    assert {f.level for f in tried("bn_jax")} == {"right"}


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("row", NAMES)
def test_the_page_says_what_is_found(row):
    """A bug that a library has mended, or a new one, fails here."""
    entry, module, distribution = NAMES[row]
    if not importlib.util.find_spec(module):
        pytest.skip(f"{module} is not installed")
    wrong, notes = report.summary(tried(entry))
    found = f"| {row} | {'; '.join(wrong) or '–'} | {'; '.join(notes) or '–'} |"
    assert found in PAGE.read_text().splitlines(), (
        f"{distribution} {importlib.metadata.version(distribution)} is no longer as our pages say. "
        f"In .docs/conform.md, its row is now: {found} - If it has mended something, the README's "
        "table 'What is different' may have to change too."
    )


@pytest.mark.slow
def test_flax_offers_no_groups_under_vmap():
    """The README says that `axis_index_groups` does not work there."""
    flax, ours = (tried_group(entry, "shards")[-1] for entry in ("flax", "bn_jax"))
    assert flax.vector == ours.vector == "two groups"
    assert flax.level == "not offered", "flax has mended axis_index_groups: see the README"
    assert ours.level == "right"


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("library", ["torch", "keras"])
def test_the_examples_of_the_page(library, tmp_path, monkeypatch):
    """They offer batch_norm, and are right but for what float32 does to a mean."""
    if not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    blocks = [b.partition("```")[0] for b in PAGE.read_text().split("```py\n")[1:]]
    (block,) = (b for b in blocks if b.startswith(f"# my_{library}.py"))
    (tmp_path / f"my_{library}.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    findings = judge.try_all(find(f"my_{library}:batch_norm"))
    assert not report.is_wrong(findings), report.summary(findings)
    assert judge.ROUNDED_MEAN in report.summary(findings)[1]
