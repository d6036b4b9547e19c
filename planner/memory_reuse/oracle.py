"""The same problem as a mixed-integer programme: the oracle of the tests, up to about 20 buffers.

Sets         buffers i with size z_i and alignment g_i;  E, pairs whose lives meet
Variables    a_i >= 0 whole, o_i = g_i a_i;  y_ij in {0, 1} for (i, j) in E, 1 when i lies below j;
             M, the arena
Objective    minimise M
Constraints  fits_i       g_i a_i + z_i <= M
             below_ij     g_i a_i + z_i <= g_j a_j + (1 - y_ij) C                       (i, j) in E
             above_ij     g_j a_j + z_j <= g_i a_i + y_ij C                             (i, j) in E
             live         M >= max-live

with C the height of all buffers on top of each other (MEMO, arXiv 2407.12117, section 4.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .buffers import Buffers, Ints, check_offsets, max_live_bytes


def solve_milp(buffers: Buffers, time_limit_s: float = 60.0) -> tuple[int, Ints] | None:
    """The smallest arena in bytes and its offsets by HiGHS, or None without a proof in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    count, unit = len(buffers), buffers.unit_bytes
    size, align = buffers.size_bytes / unit, buffers.alignment_bytes / unit
    height = float(size.sum() + align.sum())
    pairs = [
        (i, j)
        for i in range(count)
        for j in range(i + 1, count)
        if buffers.lower[i] < buffers.upper[j] and buffers.lower[j] < buffers.upper[i]
    ]
    width = 1 + count + len(pairs)  # M, a, y
    rows: list[dict[int, float]] = [{1 + i: align[i], 0: -1.0} for i in range(count)]
    at_most = [-float(value) for value in size]
    for index, (i, j) in enumerate(pairs):
        y = 1 + count + index
        rows.append({1 + i: align[i], 1 + j: -align[j], y: height})
        at_most.append(height - float(size[i]))
        rows.append({1 + j: align[j], 1 + i: -align[i], y: -height})
        at_most.append(-float(size[j]))
    matrix = np.zeros((len(rows), width))
    for index, row in enumerate(rows):
        matrix[index, list(row)] = list(row.values())
    live = max_live_bytes(buffers) / unit
    most: Any = np.array(at_most)  # SciPy's stubs know numbers only
    lowest: Any = np.concatenate(([live], np.zeros(width - 1)))
    highest: Any = np.concatenate(([height], height // align, np.ones(len(pairs))))
    found = milp(
        c=np.eye(1, width)[0],
        constraints=LinearConstraint(matrix, ub=most),  # fits, then below and above
        bounds=Bounds(lowest, highest),
        integrality=np.concatenate(([0], np.ones(width - 1))),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if not found.success:
        return None
    offsets = np.rint(found.x[1 : 1 + count]).astype(np.int64) * buffers.alignment_bytes
    if check_offsets(buffers, offsets) is not None:
        return None
    return int((offsets + buffers.size_bytes).max()), offsets
