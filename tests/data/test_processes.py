"""Real processes: killed midway, out of space, two at once."""

import functools
import gzip
import hashlib
import os
import sys
import threading

import pytest

from bn_jax.data.load import fetch
from bn_jax.data.sources import read_mirror

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


def script(synthetic, folder, url, *, before=""):
    """A program that fetches the data set and prints a hash of it; ``before`` runs first."""
    return f"""
import functools, hashlib, os, pathlib, resource, sys, time
from bn_jax.data.catalog import CatalogEntry, DataFile
from bn_jax.data.load import fetch
from bn_jax.data.sources import read_mirror
{before}
mirrors = {{"mirror": functools.partial(read_mirror, {url!r})}}
contents = fetch({synthetic.entry!r}, pathlib.Path({str(folder)!r}), mirrors)
print(hashlib.sha256(b"".join(contents)).hexdigest())
"""


def digest(synthetic):
    return hashlib.sha256(b"".join(synthetic.contents.values())).hexdigest()


def assert_a_fetch_still_succeeds(synthetic, folder, server):
    server.serve_gzip(synthetic.contents)
    mirror = functools.partial(read_mirror, server.url)
    contents = fetch(synthetic.entry, folder, {"mirror": mirror})
    assert contents == list(synthetic.contents.values())
    assert set(synthetic.contents) <= set(os.listdir(folder))


def test_killed_while_it_downloads(tmp_path, synthetic, server, start_python):
    half_sent, may_end = threading.Event(), threading.Event()
    body = gzip.compress(synthetic.contents["train-images"])

    def send_half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        half_sent.set()
        may_end.wait()

    server.bodies["/train-images.gz"] = send_half
    process = start_python(script(synthetic, tmp_path / "cache", server.url))
    assert half_sent.wait(timeout=120)
    process.kill()
    process.wait()
    may_end.set()
    assert not list(tmp_path.glob("cache/*"))
    assert_a_fetch_still_succeeds(synthetic, tmp_path / "cache", server)


def test_killed_while_it_writes(tmp_path, synthetic, server, start_python):
    server.serve_gzip(synthetic.contents)
    folder = tmp_path / "cache"
    stop = "os.fsync = lambda _: (print('written', flush=True), time.sleep(600))"
    process = start_python(script(synthetic, folder, server.url, before=stop))
    assert process.stdout.readline() == "written\n", process.communicate()[1]
    process.kill()
    process.wait()
    (left,) = os.listdir(folder)  # so it was midway indeed
    assert left.startswith(".train-images.")
    assert left.endswith(".partial")
    assert_a_fetch_still_succeeds(synthetic, folder, server)


def test_the_system_stops_a_write_midway(tmp_path, synthetic, server, start_python):
    # A limit on the size of files makes write() itself fail after some bytes, as a full disk does.
    server.serve_gzip(synthetic.contents)
    folder = tmp_path / "cache"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    process = start_python(script(synthetic, folder, server.url, before=limit))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "DataError: train-images was fetched, but the cache" in errors
    assert "File too large" in errors
    assert os.listdir(folder) == []


def test_two_processes_at_once(tmp_path, synthetic, server, start_python):
    server.serve_gzip(synthetic.contents)
    body = server.bodies["/train-images.gz"]
    together = threading.Barrier(2)

    def send_when_both_are_here(handler):
        together.wait(timeout=120)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    server.bodies["/train-images.gz"] = send_when_both_are_here
    program = script(synthetic, tmp_path / "cache", server.url)
    for process in [start_python(program), start_python(program)]:
        output, errors = process.communicate()
        assert output.strip() == digest(synthetic), errors
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(synthetic.contents)
