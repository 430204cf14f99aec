"""What compilers need to be told. None of it is about batch normalization.

Each file says which compiler does what, on which versions and devices that was seen, what it costs
without the workaround, and which test (the canary) fails on the day the workaround may go.

- `primitives`: operations with derivatives and platforms of their own; the only use of private JAX
- `sums`: several sums in one pass over memory, without losing digits, on the CPU
- `division`: quotients that are rounded once
- `barriers`: values that are taken from memory, not computed again in another way
- `notice`: a message when values are computed, not when only shapes are asked for
"""
