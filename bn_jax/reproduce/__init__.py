"""The claims of the papers on batch norm, on trial: `bn-jax reproduce`."""
