"""Batch norms of other libraries, converted: values in, values out, both ways.

One file per library: `torch`, `keras`, `haiku`, `equinox`, `flax`; `torch_model` converts a whole
state_dict, `files` reads one from disk. Importing them imports no framework. Read `settings` first:
what has to be converted beside the numbers.
"""
