"""A disk that fills up under a running experiment, as the operating system tells it."""

import json
import re

import pytest

pytest.importorskip("resource", reason="needs POSIX limits")


# No file may grow beyond so many bytes. A checkpoint of the paper's network: 400 kB.
LIMITS = {
    50_000: r"a checkpoint cannot be written to .*checkpoints/batch \(.*\); make room",
    300: r"config.json cannot be written \(File too large\); make room",
}


@pytest.fixture(scope="module")
def results(start, finish, tmp_path_factory):
    """By limit: run folder, exit status, standard error."""
    folders = {limit: tmp_path_factory.mktemp("full") / "run" for limit in LIMITS}
    options = ("--steps", 20, "--evaluate-every", 10, "--norm", "batch")
    limits = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({0}, {0}))"
    running = {
        limit: start("train", *options, "--run-dir", folder, before=limits.format(limit))
        for limit, folder in folders.items()
    }
    return {limit: (folders[limit], *finish(process)[::2]) for limit, process in running.items()}


@pytest.mark.parametrize("limit", LIMITS)
def test_one_message(limit, results):
    _, status, stderr = results[limit]
    assert status == 2
    # Beside it, or even before it on its line, a thread of orbax's may have a word about its event
    # loop, but no log of pages.
    assert len(re.findall(rf"error: .*{LIMITS[limit]}", stderr)) == 1, stderr
    assert stderr.count("; make room") == 1
    assert "absl" not in stderr


def test_metrics_are_kept_as_far_as_it_came(results):
    folder, *_ = results[50_000]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 20]
    assert list(results[300][0].iterdir()) == []
