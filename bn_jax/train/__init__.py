"""The MNIST application: the paper's networks, trained with batch norm and without.

Read in this order: `settings`, `flags` and `config` (what can be chosen, and how it is checked),
`models` and `build` (the networks), `state` and `step` (one training step), `progress` (which steps
are undone), `loop` (many steps in one compiled call, and evaluations) and `experiment` (the arms,
and what is shown and written). `sweep` shows a grid of runs. `checkpoint` and `stopping` let a run
end early and go on. Then, for several devices or processes: `sharding`, `launch` (how processes
find each other), `processes` and `multiprocess` (what they do together), `crash_reporter` (why one
died).
"""
