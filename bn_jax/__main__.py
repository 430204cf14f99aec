"""`python -m bn_jax`: the command line."""

from bn_jax.cli import program

if __name__ == "__main__":
    program()
