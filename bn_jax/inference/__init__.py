"""What is done to a network once it is trained: statistics taken anew, batch norms folded away.

`fold` works on arrays and imports jax only, so `import bn_jax` loads it. The other files are for
models of Flax, and import it.
"""
