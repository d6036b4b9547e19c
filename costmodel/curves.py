"""Times read off measured curves: interpolation in the logarithm of size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .graph import Array


def interpolate_time(sizes: Sequence[float], seconds: Sequence[float], size: Array) -> Array:
    """Time at `size` from a measured curve over one size.

    Linear in log-log between points. Below the first point the time stays (a call is never cheaper
    than its overhead); above the last it grows in proportion to size.

    >>> interpolate_time([1.0, 100.0], [1.0, 10.0], np.array([0.1, 10.0, 1000.0])).round(3).tolist()
    [1.0, 3.162, 100.0]
    """
    order = np.argsort(sizes)
    xs = np.asarray(sizes, dtype=float)[order]
    ys = np.asarray(seconds, dtype=float)[order]
    inside = np.exp(np.interp(np.log(np.maximum(size, 1e-300)), np.log(xs), np.log(ys)))
    return inside * np.maximum(1.0, size / xs[-1])


def affine_time(sizes: Sequence[float], seconds: Sequence[float], size: Array) -> Array:
    """Time at `size` on the line a + b size, a and b not negative, nearest to noisy points.

    Least squares of the errors relative to the typical size and the point's own. Beyond the last
    point the time grows with the square root of the size, as the sum of independent delays does:
    a noisy slope is not carried far.

    >>> affine_time([1.0, 3.0, 9.0], [3.0, 5.0, 11.0], np.array([0.0, 5.0, 36.0])).round(6).tolist()
    [2.0, 7.0, 22.0]
    """
    from scipy.optimize import nnls  # takes a second to import

    xs, ys = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    weights = 1.0 / (xs + np.median(xs))
    rows = np.stack([weights, weights * xs], axis=1)
    (fixed, slope), _ = nnls(rows, weights * ys)
    longest = xs.max()
    return (fixed + slope * np.minimum(size, longest)) * np.sqrt(np.maximum(1.0, size / longest))


def interpolate_rate(
    points: Array, rates: Array, query: Sequence[Array], neighbours: int = 6, power: float = 3.0
) -> Array:
    """Rate at `query` from scattered measured points, by inverse distance in log2 size.

    `points` is (P, A) sizes, `rates` (P,) work per second; `query` holds A arrays. A point that was
    measured is returned as measured. Geometric mean of the nearest points, weights
    1/distance**power.
    """
    stacked = np.stack(np.broadcast_arrays(*query), axis=-1).astype(float)
    flat = np.log2(np.maximum(stacked.reshape(-1, points.shape[1]), 1e-9))
    distance = np.linalg.norm(flat[:, None, :] - np.log2(points)[None, :, :], axis=-1)
    count = min(neighbours, len(rates))
    nearest = np.argpartition(distance, count - 1, axis=1)[:, :count]
    near = np.take_along_axis(distance, nearest, axis=1)
    weights = 1.0 / np.maximum(near, 1e-6) ** power
    log_rate = (weights * np.log(rates)[nearest]).sum(axis=1) / weights.sum(axis=1)
    return np.exp(log_rate).reshape(stacked.shape[:-1])
