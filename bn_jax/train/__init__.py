"""The MNIST application: the paper's networks, trained with batch norm and without.

Read `config` (what can be chosen), `models`, `step` (one page: the state and a training step),
`loop` (steps under `lax.scan`, evaluations between) and `experiment` (the arms, the run folder).
"""
