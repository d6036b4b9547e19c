"""Every policy of one layer that is worth using, exactly: a Pareto frontier by dynamic programming.

A policy says of each tensor of a layer: stored, compressed, or made again. How much of what is
stored waits on the host is decided later (`copies.py`); it needs of a policy three numbers alone.

    sets       t tensors, o operators in forward order, out(o), in(o) their tensors
    variables  z_t in {absent, stored, compressed, made again}; r_o in {0, 1}: o runs again
    rules      z_t is not absent if backward needs t, or if r_o = 1 for some o with t in in(o)
               z_t is made again only if r_o = 1 for the o with t in out(o)
    totals     S = sum of stored bytes s_t and compressed bytes c_t       (per micro-batch)
               F = sum of compress_t over compressed t                    (seconds in forward)
               G = sum of r_o seconds_o + sum of decompress_t             (seconds in backward)
    result     the policies whose (S, F, G) no other one is below or equal to in all three

Operators are visited in reverse. The state is the set of tensors required by what was visited and
not yet provided. An operator with required outputs either runs again, and its inputs are required
too, or its required outputs are stored, each in any of its forms; to store an output of an operator
that runs again anyway gains nothing. Of equal states only totals that no other is below or equal
to are kept, which is exact because all that follows adds the same to both. An operator runs again
at most once, however many tensors are made from it.

Without offload only S and F + G matter.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .problem import LayerType, Limits

Floats = NDArray[np.float64]
Codes = NDArray[np.uint8]

ABSENT, STORED, COMPRESSED, MADE_AGAIN = range(4)


@dataclass(frozen=True, slots=True)
class Policies:
    """Non-dominated policies of one layer type, ascending in stored bytes; arrays of one length."""

    layer: LayerType
    stored_bytes: Floats
    """S: stored, per micro-batch, on device and host together."""
    forward_s: Floats
    """F: seconds added to a forward."""
    backward_s: Floats
    """G: seconds added to a backward."""
    codes: Codes
    """(policies, tensors): the station of each tensor."""

    def __len__(self) -> int:
        return len(self.stored_bytes)


@dataclass(frozen=True, slots=True)
class _Labels:
    """Partial policies of one state: totals (n, 3) as (S, F, G), codes (n, tensors)."""

    totals: Floats
    codes: Codes

    def plus(self, totals: tuple[float, float, float], where: int, code: int) -> _Labels:
        """The same with the tensors of a bit mask put at a station."""
        codes = self.codes.copy()
        for tensor in _bits(where):
            codes[:, tensor] = code
        return _Labels(self.totals + np.array(totals), codes)


def policies(layer: LayerType, limits: Limits) -> Policies:
    """The non-dominated policies of a layer under the choices that the limits leave open."""
    number = {tensor.name: index for index, tensor in enumerate(layer.tensors)}
    needed = sum(1 << i for i, tensor in enumerate(layer.tensors) if tensor.needed)
    start = _Labels(np.zeros((1, 3)), np.zeros((1, len(layer.tensors)), np.uint8))
    states: dict[int, list[_Labels]] = {needed: [start]}
    for maker in reversed(layer.makers):
        outputs = sum(1 << number[name] for name in maker.outputs)
        inputs = sum(1 << number[name] for name in maker.inputs)
        following: dict[int, list[_Labels]] = {}
        for required, found in states.items():
            labels = _undominated(found, limits.offload)
            made, rest = required & outputs, required & ~outputs
            if not made:
                following.setdefault(required, []).append(labels)
                continue
            following.setdefault(rest, []).extend(_store(labels, layer, made, limits))
            if maker.repeatable:
                again = labels.plus((0.0, 0.0, maker.seconds), made, MADE_AGAIN)
                following.setdefault(rest | inputs, []).append(again)
        states = following
    ends: list[_Labels] = []
    for required, found in states.items():
        ends += _store(_undominated(found, limits.offload), layer, required, limits)
    best = _undominated(ends, limits.offload)
    order = np.lexsort((best.totals[:, 2], best.totals[:, 1], best.totals[:, 0]))
    totals = best.totals[order]
    return Policies(layer, totals[:, 0], totals[:, 1], totals[:, 2], best.codes[order])


def _store(labels: _Labels, layer: LayerType, which: int, limits: Limits) -> list[_Labels]:
    """The labels with the tensors of a mask stored, each in any of its forms."""
    found = [labels]
    for index in _bits(which):
        tensor = layer.tensors[index]
        here = [label.plus((tensor.bytes, 0.0, 0.0), 1 << index, STORED) for label in found]
        small = tensor.compressed_bytes
        if limits.compress and small is not None and small < tensor.bytes:
            totals = (small, tensor.compress_s, tensor.decompress_s)
            here += [label.plus(totals, 1 << index, COMPRESSED) for label in found]
        found = here
    return found


def _bits(mask: int) -> list[int]:
    return [index for index in range(mask.bit_length()) if mask >> index & 1]


def _undominated(found: list[_Labels], offload: bool) -> _Labels:
    """One of each group of labels that are below or equal to no other one; the first of equals."""
    totals = np.concatenate([label.totals for label in found])
    codes = np.concatenate([label.codes for label in found])
    if len(totals) == 1:
        return _Labels(totals, codes)
    if offload:
        kept = undominated(totals)
    else:
        kept = undominated(np.stack((totals[:, 0], totals[:, 1] + totals[:, 2]), axis=1))
    return _Labels(totals[kept], codes[kept])


def undominated(points: Floats) -> NDArray[np.intp]:
    """Rows that no other row is below or equal to in every column; of equal rows the first.

    `points` has one to three columns.
    """
    varying = np.flatnonzero(np.ptp(points, axis=0) > 0)
    if not len(varying):
        return np.zeros(1, dtype=np.intp)
    points = points[:, varying]
    order = np.lexsort(points.T[::-1])
    points = points[order]
    if points.shape[1] == 3:
        return np.sort(order[_on_staircase(points)])
    lowest = np.minimum.accumulate(points[:, -1])
    better = np.concatenate(([True], points[1:, -1] < lowest[:-1]))
    if points.shape[1] == 1:
        better[1:] = False
    return np.sort(order[better])


def _on_staircase(points: Floats) -> NDArray[np.intp]:
    """Undominated rows of points that ascend in their first column, then the second, the third.

    What was seen so far is a staircase in the other two columns: one ascends, the other descends.
    """
    steps: list[float] = []
    heights: list[float] = []
    kept: list[int] = []
    for row, (_, step, height) in enumerate(points.tolist()):
        at = bisect_right(steps, step)
        if at and heights[at - 1] <= height:
            continue
        end = at
        while end < len(steps) and heights[end] >= height:
            end += 1
        if at and steps[at - 1] == step:
            at -= 1
        steps[at:end], heights[at:end] = [step], [height]
        kept.append(row)
    return np.array(kept, dtype=np.intp)
