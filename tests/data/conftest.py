"""A data set of 25 images, a web server and an npm client: local, and misbehaving on demand."""

import gzip
import hashlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from bn_jax.data.catalog import CatalogEntry, DataFile
from bn_jax.data.idx import encode_idx as encode


class Synthetic(NamedTuple):
    entry: CatalogEntry
    contents: dict[str, bytes]


def make_synthetic(seed: int = 0, train: int = 20, test: int = 5) -> Synthetic:
    random = np.random.default_rng(seed)
    contents = {
        "train-images": encode(random.integers(0, 256, (train, 28, 28), np.uint8)),
        "train-labels": encode(random.integers(0, 10, (train,), np.uint8)),
        "test-images": encode(random.integers(0, 256, (test, 28, 28), np.uint8)),
        "test-labels": encode(random.integers(0, 10, (test,), np.uint8)),
    }
    files = (
        DataFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    )
    return Synthetic(CatalogEntry("synthetic", tuple(files), npm="digits@1.0.0"), contents)


@pytest.fixture(scope="session")
def synthesize():
    return make_synthetic


@pytest.fixture(scope="session")
def synthetic():
    return make_synthetic()


@pytest.fixture(autouse=True)
def local_addresses_need_no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Server(http.server.ThreadingHTTPServer):
    """Serves ``bodies`` by path; a callable in their place handles the request itself."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: dict[str, bytes | Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.requested: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def serve_gzip(self, contents: dict[str, bytes]) -> None:
        self.bodies |= {f"/{name}.gz": gzip.compress(body) for name, body in contents.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.requested.append(self.path)
        body = self.server.bodies.get(self.path)
        if body is None:
            self.send_error(404)
        elif callable(body):
            body(self)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        server.daemon_threads = True
        # A handler may still wait for a client that a test has killed.
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def npm_client(tmp_path, monkeypatch):
    """Puts an ``npm`` on PATH, alone there, that runs the Python code given."""

    def install(code: str):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "npm"
        program.write_text(f"#!{sys.executable} -IS\nimport os, sys, time\n{code}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return install


@pytest.fixture
def no_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))


@pytest.fixture
def start_python():
    """Starts a Python process on a script; whatever still runs at the end is killed."""
    processes = []

    def start(script: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()
