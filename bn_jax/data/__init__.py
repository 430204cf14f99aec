"""MNIST and Fashion-MNIST: fetched, verified, decoded."""

from bn_jax.data.load import Dataset as Dataset
from bn_jax.data.load import load as load
from bn_jax.data.verify import DataError as DataError
