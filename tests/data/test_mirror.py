"""A mirror over real HTTP, with the ways in which servers fail."""

import gzip
import io
import re
import socket
import sys
import time

import pytest

from bn_jax.data import DataError
from bn_jax.data.sources import read_mirror


def read(url, file, **options):
    """One file of a mirror."""
    (data,) = read_mirror(url, [file], **options)
    return data


@pytest.fixture
def file(synthetic):
    return synthetic.entry.files[0]


@pytest.fixture
def content(synthetic, file):
    return synthetic.contents[file.name]


def respond(body, *, status=200, **headers):
    def handle(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return handle


def test_each_file_is_downloaded_and_decompressed(server, synthetic):
    server.serve_gzip(synthetic.contents)
    read_all = list(read_mirror(server.url, synthetic.entry.files))
    assert read_all == list(synthetic.contents.values())
    assert server.requested == [f"/{file.name}.gz" for file in synthetic.entry.files]


def test_a_server_that_hides_gzip_in_the_transfer(server, file, content):
    server.bodies[f"/{file.name}.gz"] = respond(gzip.compress(content), Content_Encoding="gzip")
    assert read(server.url, file) == content


def test_a_server_that_sends_elsewhere(server, file, content):
    server.bodies[f"/{file.name}.gz"] = respond(b"", status=302, Location="/moved")
    server.bodies["/moved"] = gzip.compress(content)
    assert read(server.url, file) == content


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
def test_a_refusal(server, file, status):
    server.bodies[f"/{file.name}.gz"] = respond(b"", status=status)
    with pytest.raises(OSError, match=str(status)):
        read(server.url, file)


def test_nobody_listens(file):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(OSError, match=r"no connection: .*Connection refused"):
        read(f"http://127.0.0.1:{port}/", file)


def test_a_name_that_does_not_exist(file):
    with pytest.raises(OSError, match="no connection: "):
        read("http://mirror.invalid/", file)


def test_a_server_that_never_answers(file):
    # The operating system accepts the connection; nobody reads from it.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(OSError, match="Read timed out"):
            read(url, file, read_seconds=0.1)


def test_connecting_and_reading_are_limited_in_time(monkeypatch, file):
    given = {}

    def get(url, *, timeout, **_):
        given[url] = timeout
        raise OSError("enough seen")

    monkeypatch.setattr("requests.get", get)
    with pytest.raises(OSError, match="enough seen"):
        read("https://mirror.invalid/", file)
    assert given == {f"https://mirror.invalid/{file.name}.gz": (10, 30)}


def test_a_connection_that_breaks(server, file, content):
    body = gzip.compress(content)
    server.bodies[f"/{file.name}.gz"] = respond(body[:-100], Content_Length=str(len(body)))
    with pytest.raises(Exception, match=r"IncompleteRead|damaged gzip"):
        read(server.url, file)


def test_an_answer_that_drips(server, file):
    """Each byte comes in time, and all of them never."""

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass  # the client has hung up

    server.bodies[f"/{file.name}.gz"] = drip
    with pytest.raises(OSError, match=r"not done within 0.3 s"):
        read(server.url, file, read_seconds=5, total_seconds=0.3)


@pytest.mark.parametrize(
    "answer",
    [
        respond(b"", status=302, Location="http://[::1"),
        respond(b"", status=302, Location="http://a..b/"),
        respond(b"", status=302, Location="http://*:99999999/"),
        respond(b"", status=302, Location="nowhere://"),
        respond(b"x", Content_Length="many"),
        respond(b"x", Content_Length="-5"),
    ],
)
@pytest.mark.parametrize("progress", [False, True])
def test_an_answer_that_makes_no_sense(answer, progress, server, file, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: progress, raising=False)
    server.bodies[f"/{file.name}.gz"] = answer
    with pytest.raises(Exception, match=r"."):  # of some class; after it the next source is asked
        read(server.url, file, progress=progress)


def test_a_download_without_end(server, file):
    def send_forever(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(bytes(1 << 16))
        except OSError:
            pass  # the client has hung up, as it should

    server.bodies[f"/{file.name}.gz"] = send_forever
    with pytest.raises(DataError, match="found more than"):
        read(server.url, file)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda content: gzip.compress(content + bytes(500_000)), "found more than"),
        (lambda content: gzip.compress(content)[:-1], "damaged gzip"),
        (lambda content: gzip.compress(content) + b"junk", "damaged gzip"),
        (lambda content: gzip.compress(content[:-1] + b"\x00"), "found SHA-256"),
        (lambda content: b"<html>Please log in</html>", "found 26 bytes"),
    ],
)
def test_wrong_bytes_do_not_pass(server, file, content, bad, message):
    server.bodies[f"/{file.name}.gz"] = bad(content)
    with pytest.raises(DataError, match=message):
        read(server.url, file)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def connect_terminal(monkeypatch):
    # Not a fixture: pytest sets sys.stderr anew between a test's fixtures and the test.
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def test_progress_on_a_terminal(server, file, content, monkeypatch):
    terminal = connect_terminal(monkeypatch)
    server.bodies[f"/{file.name}.gz"] = gzip.compress(content)
    assert read(server.url, file, progress=True) == content
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    last_frame = shown[shown.rindex(file.name) :]
    assert "/15.7 kB" in last_frame
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)


def test_progress_leaves_the_terminal_in_order_after_a_failure(server, file, monkeypatch):
    terminal = connect_terminal(monkeypatch)
    with pytest.raises(OSError, match="404"):
        read(server.url, file, progress=True)
    shown = terminal.getvalue()
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)


@pytest.mark.parametrize(("stream", "progress"), [(Terminal, False), (io.StringIO, True)])
def test_quiet_if_told_so_or_not_on_a_terminal(
    server, file, content, monkeypatch, stream, progress
):
    server.bodies[f"/{file.name}.gz"] = gzip.compress(content)
    monkeypatch.setattr(sys, "stderr", stream())
    assert read(server.url, file, progress=progress) == content
    assert not sys.stderr.getvalue()


def test_progress_survives_the_absence_of_standard_error(server, file, content, monkeypatch):
    server.bodies[f"/{file.name}.gz"] = gzip.compress(content)
    monkeypatch.setattr(sys, "stderr", None)
    assert read(server.url, file, progress=True) == content
