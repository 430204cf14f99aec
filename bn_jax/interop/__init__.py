"""Converts batch norms from and to other libraries: torch, keras, haiku, equinox and flax.

One file per library, with `from_…` and `to_…`. `torch_model` converts a whole state_dict, and
`files` reads one from disk. None of them imports the other library (`to_equinox` excepted). Read
`settings` first: it says what has to be converted besides the numbers.
"""
