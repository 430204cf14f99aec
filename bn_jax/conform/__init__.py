"""Any batch norm on trial: `bn-jax conform module:function`, explained in .docs/conform.md.

The files, in the order to read them: `oracle` is batch norm in float64, `bars` says how accurate
float32 can be, `vectors` holds inputs with known results, `generate` makes them, `contract` calls a
candidate on them, `judge` says what is wrong, `suspects` and `conventions` know why.
"""
