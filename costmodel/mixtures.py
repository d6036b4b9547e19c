"""The least time of a rank whose layers keep unlike parts of their activations."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .graph import Array
from .memory import Peaks

PARTS = tuple(field.name for field in fields(Peaks))


def part(peaks: Peaks, index: int | NDArray[np.bool_]) -> Peaks:
    """The rows, or of several policies the rank, at an index of the second axis."""
    return Peaks(**{name: getattr(peaks, name)[:, index] for name in PARTS})


def least_extra_s(peaks: Peaks, extra_s: Array, capacity_bytes: float) -> Array:
    """Least time of a mixture of policies within the capacity; arrays are (policies, rows).

    Infinite where nothing fits.

    >>> kept, extra = np.array([[10.0], [0.0]]), np.array([[0.0], [4.0]])
    >>> peaks = Peaks(total=kept + 5, kept=kept, working=0 * kept + 5, closing=0 * kept,
    ...               others=0 * kept)
    >>> float(least_extra_s(peaks, extra, 10.0)[0])
    2.0
    """
    kept = peaks.kept
    best = np.min(np.where(peaks.total <= capacity_bytes, extra_s, np.inf), axis=0)
    others = np.min(peaks.others, axis=0)
    for i, j in combinations(range(len(kept)), 2):
        left = capacity_bytes - np.maximum(peaks.closing[i], peaks.closing[j])
        room = np.where(left >= 0, left / np.maximum(others, 1e-9), -np.inf)
        room = np.minimum(room, capacity_bytes - np.maximum(peaks.working[i], peaks.working[j]))
        first = kept[i] > kept[j]
        more, less = np.where(first, kept[i], kept[j]), np.where(first, kept[j], kept[i])
        fast = np.where(first, extra_s[i], extra_s[j])
        slow = np.where(first, extra_s[j], extra_s[i])
        between = (less <= room) & (room < more)
        share = (more - np.where(between, room, 0.0)) / np.where(between, more - less, 1.0)
        best = np.minimum(best, np.where(between, fast + share * (slow - fast), np.inf))
    return best
