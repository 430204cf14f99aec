"""A right batch norm in twenty lines of numpy, in which test_planted.py plants bugs."""

import numpy as np


def batch_norm(x, scale, bias, epsilon):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes, dtype=np.float64)
    var = np.square(x - mean).mean(axes)
    y = scale * (x - mean) / np.sqrt(var + epsilon) + bias
    return y, mean, var


def gradient(x, scale, bias, epsilon, dy):
    axes, m = tuple(range(x.ndim - 1)), x.size / x.shape[-1]
    _, mean, var = batch_norm(x, scale, bias, epsilon)
    std = np.sqrt(var + epsilon)
    normalized = (x - mean) / std
    dbias = dy.sum(axes, dtype=np.float64)
    dscale = (dy * normalized).sum(axes)
    dx = scale / std * (dy - dbias / m - normalized * dscale / m)
    return dx, dscale, dbias


def infer(x, scale, bias, epsilon, mean, var):
    return scale * (x - mean.astype(np.float64)) / np.sqrt(var + epsilon) + bias


def running(batches, decay):
    mean, var = 0.0, 1.0
    for x in batches:
        _, new_mean, new_var = batch_norm(x, 1, 0, 0.1)
        mean = decay * mean + (1 - decay) * new_mean
        var = decay * var + (1 - decay) * new_var * len(x) / max(len(x) - 1, 1)
    return mean, var
