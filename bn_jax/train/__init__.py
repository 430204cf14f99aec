"""The MNIST application: the paper's networks, trained with batch norm and without.

Read `config` (what can be chosen), `models`, `step` (one page: the state and a training step),
`progress` (what becomes of a step that is not finite), `loop` (steps under `lax.scan`, evaluations
between) and `experiment` (the arms, the run folder). `checkpoint` and `stopping` are how a run ends
early and goes on later. `sweep` shows a grid of runs.
Then, for what does not fit one pass, device or process: `micro_batches`, `placement` (a mesh), and
`multiprocess` (`launch` finds the other processes; `crash_reporter` says why one died).
"""
