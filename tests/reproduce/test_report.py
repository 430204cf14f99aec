"""The report: complete, self-contained, the same at each run, and honest about quick runs."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from bn_jax.reproduce.claims import CLAIMS
from bn_jax.reproduce.report import number, write_report
from tests.reproduce.test_claims import PUBLISHED

NAMES = ("figure-1", "weight-decay")
VERSIONS = {"device": "CPU, jax 0.0", "cores": 2, "bn-jax": "0.1", "commit": "0123456789abcdef"}


def write(folder, quick=False, seconds=61.0):
    records = {
        name: {
            **{"seeds": 5, "quick": quick, "date": "2026-01-31", "seconds": seconds},
            **{"versions": VERSIONS, "results": PUBLISHED[name]},
        }
        for name in NAMES
    }
    folder.mkdir(exist_ok=True)
    write_report(folder, [CLAIMS[name] for name in NAMES], records)
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"))


def test_the_page_has_each_claim_with_its_figure_and_needs_no_other_file(report):
    page = (report / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert (
        sum(source.startswith("data:image/svg+xml;base64,") for source in sources) == len(NAMES) + 1
    )
    anchors = [source for source in sources if not source.startswith("data:")]
    assert sorted(anchors) == sorted(f"#{name}" for name in NAMES)
    assert not re.search(r"url\(|@import|<script", page)
    for name in NAMES:
        claim = CLAIMS[name]
        for text in (claim.title, claim.statement, claim.published, claim.prediction):
            assert text.replace("'", "&#39;").replace('"', "&#34;") in page
        assert f'<section id="{name}">' in page


def test_its_markup_is_balanced(report):
    page = (report / "report.html").read_text().replace("<!DOCTYPE html>", "")
    void = re.sub(r"<(meta|img|br)([^>]*)>", r"<\1\2/>", page)
    ElementTree.fromstring(void)


def test_markdown_and_figures(report):
    text = (report / "report.md").read_text()
    for name in NAMES:
        assert f"(figures/{name}.svg)" in text
        assert (report / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(report / "figures" / f"{name}.svg")
    assert "\n\n\n" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_the_verdict_stands_beside_the_claim(report):
    results = json.loads((report / "results.json").read_text())
    text = (report / "report.md").read_text()
    for name in NAMES:
        assert results["claims"][name]["verdict"] == "holds"
        assert len(results["claims"][name]["checks"]) > 1
        assert f"[{CLAIMS[name].title}](#{name})" in text
    assert text.count("✓ holds |") >= len(NAMES)


def test_two_reports_of_the_same_results_are_the_same_but_for_times(report, tmp_path):
    other = write(tmp_path / "other", seconds=75.0)
    for path in report.rglob("*.svg"):
        assert path.read_bytes() == (other / path.relative_to(report)).read_bytes()
    one, two = (json.loads((f / "results.json").read_text()) for f in (report, other))
    assert one.pop("runs") != two.pop("runs")
    assert one == two


def test_a_quick_run_says_on_every_page_that_it_is_no_evidence(report, tmp_path):
    quick = write(tmp_path / "quick", quick=True)
    for page in ("report.html", "report.md"):
        assert (quick / page).read_text().count("not evidence") == len(NAMES)
        assert "evidence" not in (report / page).read_text()
    assert json.loads((quick / "results.json").read_text())["claims"]["figure-1"]["quick"]
    assert "`bn-jax reproduce figure-1 --quick`, 5 seeds" in (quick / "report.md").read_text()


def test_the_command_of_a_claim_gives_as_many_seeds(report):
    assert "`bn-jax reproduce figure-1 --seeds 5`, 5 seeds" in (report / "report.md").read_text()


def test_numbers_are_as_long_as_they_are_of_use():
    values = [0.97654, -0.0123, 14600.0, 3.14159, 2.5e-9, 0.0, 12.0, 1234.5]
    texts = ["0.977", "-0.012", "14,600", "3.14", "2.5e-09", "0", "12", "1,234"]
    assert [number(value) for value in values] == texts


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_browser_shows_every_figure(report, tmp_path):
    """The page is opened; the text that comes back is what its script-free body holds."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-sync", "--disable-component-update"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    probe = tmp_path / "probe.html"
    # The probe's script says which pictures were decoded, in the title.
    widths = "[...document.images].map(image => image.naturalWidth)"
    script = f"<script>onload = () => {{ document.title = {widths}.join() }}</script>"
    probe.write_text((report / "report.html").read_text().replace("</head>", f"{script}</head>"))
    command = [BROWSER, *options, "--dump-dom", "--virtual-time-budget=5000", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    widths = re.search(r"<title>([\d,]+)</title>", done.stdout)
    assert widths, done.stderr
    assert [int(width) > 100 for width in widths[1].split(",")] == [True] * (len(NAMES) + 1)
    assert "CONSOLE" not in done.stderr
