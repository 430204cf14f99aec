"""A batch norm in numpy that offers all that `bn-jax conform` tries; it is right by every vector.

It is about as short as a right one can be: it computes in float64, counts what a mask leaves, and
keeps what it remembered where a batch has nothing to tell.

    bn-jax conform bn_jax.conform.example
"""

import numpy as np

unbiased = True


def moments(x, mask=None):
    """The data in float64 with padding set to zero, its weights, count, mean and variance."""
    weights = np.ones(x.shape[:-1]) if mask is None else mask.astype(float)
    weights, axes = weights[..., None], tuple(range(x.ndim - 1))
    x, count = np.where(weights > 0, x.astype(float), 0), weights.sum(axes)
    mean = (weights * x).sum(axes) / np.maximum(count, 1)
    return x, weights, count, mean, (weights * (x - mean) ** 2).sum(axes) / np.maximum(count, 1)


def batch_norm(x, scale, bias, epsilon, mask=None):
    """y, and the mean and biased variance of the batch."""
    x, _, count, mean, var = moments(x, mask)
    if (count == 1).all():
        raise ValueError("one value per feature has no variance: train on larger batches")
    return infer(x, scale, bias, epsilon, mean, var), mean, var


def gradient(x, scale, bias, epsilon, dy, mask=None):
    """dx, dscale, dbias."""
    x, weights, count, mean, var = moments(x, mask)
    std, axes = np.sqrt(var + epsilon), tuple(range(x.ndim - 1))
    normalized = (x - mean) / std
    dbias, dscale = dy.sum(axes, dtype=float), (dy * normalized).sum(axes)
    dx = scale / std * (dy - weights * (dbias + normalized * dscale) / count)
    return dx, dscale, dbias


def infer(x, scale, bias, epsilon, mean, var):
    """Y by given statistics."""
    return scale * (x.astype(float) - mean) / np.sqrt(var.astype(float) + epsilon) + bias


def running(batches, decay, masks=None):
    """A debiased average of means and unbiased variances; what is not finite is left out."""
    mean = var = weight = np.zeros(batches[0].shape[-1])
    for n, x in enumerate(batches):
        _, _, count, new_mean, new_var = moments(x, None if masks is None else masks[n])
        good = np.isfinite(new_mean + new_var) & (count > 1)
        unbiased_var = new_var * count / np.maximum(count - 1, 1)
        mean = np.where(good, decay * mean + (1 - decay) * new_mean, mean)
        var = np.where(good, decay * var + (1 - decay) * unbiased_var, var)
        weight = np.where(good, decay * weight + (1 - decay), weight)
    return mean / weight, var / weight


def sharded(x, scale, bias, epsilon, mask=None, groups=None):
    """Shards of one batch, or of one batch for each group of shards."""
    y, mean, var = np.zeros(x.shape), np.zeros(x[:, 0].shape), np.zeros(x[:, 0].shape)
    for group in groups or [list(range(len(x)))]:
        part = None if mask is None else mask[group]
        y[group], mean[group], var[group] = batch_norm(x[group], scale, bias, epsilon, part)
    return y, mean, var


def renorm(x, scale, bias, epsilon, mean, var, r_max, d_max):
    """Batch Renormalization, Algorithm 1 of Ioffe (2017)."""
    x, _, _, batch_mean, batch_var = moments(x)
    std, running_std = np.sqrt(batch_var + epsilon), np.sqrt(var + epsilon)
    r = np.clip(std / running_std, 1 / r_max, r_max)
    d = np.clip((batch_mean - mean) / running_std, -d_max, d_max)
    return scale * ((x - batch_mean) / std * r + d) + bias
