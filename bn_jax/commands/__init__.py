"""The commands of `bn-jax`: each is a function, and its arguments are its flags."""
