"""Batch normalization as mathematics: measure, average, normalize.

Read `moments`, `averages`, `normalize` and `batch_norm`, in this order. Imports jax only.
"""
