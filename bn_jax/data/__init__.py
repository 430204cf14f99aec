"""MNIST and Fashion-MNIST: fetched, verified, decoded."""

from bn_jax.data.errors import DataError as DataError
from bn_jax.data.load import Dataset as Dataset
from bn_jax.data.load import load as load
