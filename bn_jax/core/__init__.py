"""Batch normalization as mathematics: measure, average, normalize. Imports only jax.

To understand it, read these in order:

1. `layout`: which axes are features, and how numbers per feature come in and go out
2. `centered`: the two linear maps between data and numbers per feature, and their derivatives
3. `sums`: sums about an origin near the mean, which lose no digits
4. `moments`: mean, variance and count of a batch; how moments are merged and pooled
5. `normalize`: how statistics act on data
6. `standardize`: a batch normalized by its own moments, which it returns as well
7. `averages` and `state`: how much of the past is kept, and what is remembered
8. `batch_norm`: 6 and 7 for training, 5 for inference

They use `replicas` (sums over named axes) and `ghost` (groups of examples). Built from them are
`renorm` and `correction` (Batch Renormalization), `population` and `recalibrate` (Algorithm 2), and
`pool_states` (replicas that trained apart). `checks` refuses mistakes, `dtypes` says how precise
statistics are, `exported` makes named tuples known to jax.export, and `xla` is what compilers need.
"""
