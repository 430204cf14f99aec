"""The catalog agrees with itself; that it agrees with the world, ``test_real.py`` shows."""

import re

import pytest

from bn_jax.data.catalog import CATALOG

entries = pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.name)


@entries
def test_sizes_are_those_of_sixty_and_ten_thousand_examples(entry):
    for (images, labels), count in zip(
        (entry.files[:2], entry.files[2:]), (60_000, 10_000), strict=True
    ):
        assert ("images" in images.name, images.size) == (True, 16 + count * 28 * 28)
        assert ("labels" in labels.name, labels.size) == (True, 8 + count)


@entries
def test_mirrors_are_folders_over_https(entry):
    assert entry.mirrors
    for url in entry.mirrors:
        assert re.fullmatch(r"https://[^?#]+/", url)


def test_no_two_files_share_a_hash():
    hashes = [file.sha256 for entry in CATALOG.values() for file in entry.files]
    assert len(set(hashes)) == 8
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)


def test_an_entry_is_found_under_its_own_name():
    assert all(name == entry.name for name, entry in CATALOG.items())
