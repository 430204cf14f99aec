"""The MNIST application: the paper's networks, trained with batch norm and without.

Read in this order: `settings`, `flags`, `grid` and `config` (what can be chosen, the runs that this
stands for, and how it is checked), `models` and `build` (the networks), `state` and `step` (one
training step), `progress` (which steps are undone), `loop` (many steps in one compiled call),
`scoring`, and `experiment` (the arms, and what is left on disk; `summary` and `display` make its
tables and plots). `checkpoint` and `stopping` let a run end early and go on, and `evaluation` looks
at what it left. Then, for several devices or processes: `sharding`, `launch` (how processes
find each other), `processes` and `multiprocess` (what they do together), `crash_reporter` (why one
died).
"""
