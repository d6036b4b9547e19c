"""Branch and bound over placements from the bottom of the arena up: the loop that numba compiles.

Sets         buffers i by sections [a_i, b_i) (`sections`); U the unplaced ones of a sub-problem,
             which is a range [p, q) of sections with a least offset o'
Variables    o_i, the offset of i
Objective    none: any placement with o_i + z_i <= C ends the search
Constraints  g_i divides o_i;  o_i + z_i <= o_j or o_j + z_j <= o_i
             where [a_i, b_i) meets [a_j, b_j)

State: m_i, least offset that the placed buffers leave to i; tot_k, sum of the rounded sizes w_i of
the unplaced buffers of section k; f_k = min of m_i over them, the floor of the section. One node
places one buffer i of U at m_i:

canonical     placements are made in the order of (offset, rank), so that each has one path
dominance     only i with m_i < min over U of (m_j + w_j): else j would fit below i and stay there
inference     max(f_k, m_i) + tot_k <= C + slack_k for every section k of the sub-problem
hatless       if placing i raises no m_j and what follows fails, siblings of i fail too
split         where no unplaced buffer lives in both k and k + 1 the sub-problem falls apart; parts
              are solved one after another, a part that fails fails the placement

The rank sorts by up to three of: largest tot_k among a buffer's sections when the sub-problem came
into being (T), length of life (W), area (A), all descending: `before` ranks what comes ahead of T,
`after` what comes behind. The rules are those of the published minimalloc search (Moffitt,
"MiniMalloc", ASPLOS 2023). Two things differ: the stack is explicit, so that depth is no limit, and
a floor is taken again only when the buffer that defines it moves.
"""

from __future__ import annotations

import numpy as np

from .buffers import Ints

INFEASIBLE, FOUND, NODE_LIMIT = 0, 1, 2
MANY = 1000
"""A part of more rows than this keeps its order until it has lost a tenth of them: sorting anew
after every split would then take longer than all the rest."""
NEVER = 2**62

SIGNATURE = "int64(" + "int64[::1], " * 13 + "int64, int64, int64[::1], int64[::1])"


def search_tree(
    first: Ints,
    last: Ints,
    size: Ints,
    rounded: Ints,
    alignment: Ints,
    before: Ints,
    after: Ints,
    total: Ints,
    room: Ints,
    cut: Ints,
    member_start: Ints,
    members: Ints,
    offset: Ints,
    capacity: int,
    max_nodes: int,
    rank: Ints,
    nodes: Ints,
) -> int:
    """INFEASIBLE, FOUND or NODE_LIMIT; writes `offset` (n,) when found, the count to `nodes[0]`.

    Rows are sorted by `first`; `total` and `cut` (S,) are worked on, `room` (S,) is C + slack_k.
    """
    n, num_sections = first.shape[0], total.shape[0]
    least = np.zeros(n, dtype=np.int64)
    placed = np.zeros(n, dtype=np.bool_)
    following = np.arange(1, n + 2)  # unplaced rows as a ring through the sentinel n
    previous = np.arange(-1, n)
    following[n], previous[0] = 0, n
    floor = np.zeros(num_sections, dtype=np.int64)
    witness = np.empty(num_sections, dtype=np.int64)
    for k in range(num_sections):
        witness[k] = members[member_start[k]]
    # What was changed: a code, and the values before. Codes: row, n + section, then ranks, places.
    log = np.empty((8 * n + 64, 3), dtype=np.int64)
    log_size = 0
    at_rank = n + num_sections
    at_place = at_rank + n
    frame_p = np.zeros(n + 2, dtype=np.int64)
    frame_q = np.zeros(n + 2, dtype=np.int64)
    frame_head = np.zeros(n + 2, dtype=np.int64)
    frame_offset = np.zeros(n + 2, dtype=np.int64)
    frame_rank = np.zeros(n + 2, dtype=np.int64)
    frame_ceiling = np.zeros(n + 2, dtype=np.int64)  # candidates start below it
    frame_ordered = np.zeros(n + 2, dtype=np.int64)  # unplaced buffers when ranks were given
    frame_log = np.zeros(n + 2, dtype=np.int64)
    frame_placed = np.full(n + 2, -1, dtype=np.int64)
    frame_part = np.zeros(n + 2, dtype=np.int64)  # section to look for the next part from
    frame_hat = np.zeros(n + 2, dtype=np.bool_)
    frame_q[0], frame_ordered[0] = num_sections, 2 * n
    depth, count = 0, 0
    enter, attempt, descend = 0, 1, 2
    mode = descend
    while True:
        p, q = frame_p[depth], frame_q[depth]
        if mode == enter:
            head = frame_head[depth]
            ceiling = np.int64(NEVER)
            j = head
            while j != n and first[j] < q:
                ceiling = min(ceiling, least[j] + rounded[j])
                j = following[j]
            highest = np.int64(NEVER)
            for k in range(p, q):
                if total[k] > 0:
                    highest = min(highest, room[k] - total[k])
            frame_ceiling[depth] = min(ceiling, highest + 1)
            frame_placed[depth] = -1
            mode = attempt
        elif mode == attempt:
            if frame_placed[depth] >= 0:  # the placement failed
                while log_size > frame_log[depth]:
                    log_size -= 1
                    code, value = log[log_size, 0], log[log_size, 1]
                    if code < n:
                        least[code] = value
                    elif code < at_rank:
                        floor[code - n] = value
                        witness[code - n] = log[log_size, 2]
                    elif code < at_place:
                        rank[code - at_rank] = value
                    else:
                        i = code - at_place
                        placed[i] = False
                        following[previous[i]] = i
                        previous[following[i]] = i
                        for k in range(first[i], last[i]):
                            total[k] += rounded[i]
                            cut[k] += 1
                        cut[last[i] - 1] -= 1
                frame_placed[depth] = -1
                if frame_hat[depth]:
                    frame_ceiling[depth] = 0
            if depth == 0:
                nodes[0] = count
                return INFEASIBLE
            at, at_rank_of, i = frame_ceiling[depth], n, n
            tried, tried_rank = frame_offset[depth], frame_rank[depth]
            j = frame_head[depth]
            while j != n and first[j] < q:
                m = least[j]
                if m <= at and m >= tried:
                    r = rank[j]
                    if (m < at or r < at_rank_of) and (m > tried or r > tried_rank):
                        at, at_rank_of, i = m, r, j
                j = following[j]
            if i == n or at >= frame_ceiling[depth]:
                depth -= 1
                continue
            frame_offset[depth], frame_rank[depth] = at, at_rank_of
            count += 1
            if count > max_nodes:
                nodes[0] = max_nodes
                return NODE_LIMIT
            if log_size + 2 * n + num_sections + 1 > log.shape[0]:
                more = np.empty((2 * log.shape[0] + 2 * n + num_sections + 1, 3), dtype=np.int64)
                more[:log_size] = log[:log_size]
                log = more
            frame_log[depth], frame_placed[depth] = log_size, i
            log[log_size, 0] = at_place + i
            log_size += 1
            offset[i] = at
            placed[i] = True
            following[previous[i]] = following[i]
            previous[following[i]] = previous[i]
            a, b = first[i], last[i]
            for k in range(a, b):
                total[k] -= rounded[i]
                cut[k] -= 1
            cut[b - 1] += 1
            top = at + rounded[i]
            fits = at + size[i] <= capacity
            raised = False
            low_section, high_section = a, b
            j = frame_head[depth]
            if j == i:
                j = following[i]
            while fits and j != n and first[j] < b:
                if last[j] > a and least[j] < top:
                    raised = True
                    to = -(-top // alignment[j]) * alignment[j]
                    log[log_size, 0], log[log_size, 1] = j, least[j]
                    log_size += 1
                    least[j] = to
                    fits = to + size[j] <= capacity
                    low_section = min(low_section, first[j])
                    high_section = max(high_section, last[j])
                j = following[j]
            frame_hat[depth] = fits and not raised
            k = low_section
            while fits and k < high_section:
                if total[k] > 0:
                    held = witness[k]
                    if placed[held] or least[held] > floor[k]:
                        old, best, holder = floor[k], np.int64(NEVER), held
                        for s in range(member_start[k], member_start[k + 1]):
                            j = members[s]
                            if not placed[j] and least[j] < best:
                                best, holder = least[j], j
                                if best == old:
                                    break
                        code = n + k
                        log[log_size, 0], log[log_size, 1] = code, old
                        log[log_size, 2] = held
                        log_size += 1
                        floor[k], witness[k] = best, holder
                        fits = best + total[k] <= room[k]
                k += 1
            if fits:
                frame_part[depth] = p
                mode = descend
        else:
            start = frame_part[depth]
            while start < q and total[start] == 0:
                start += 1
            if start == q:  # all parts are solved, and so is the part that this frame was
                if depth == 0:
                    nodes[0] = count
                    return FOUND
                depth -= 1
                continue
            end = start + 1
            while end < q and cut[end - 1] > 0:
                end += 1
            beyond = end
            while beyond < q and total[beyond] == 0:
                beyond += 1
            whole = depth > 0 and frame_part[depth] == p and beyond == q
            frame_part[depth] = end
            at_member = member_start[start]
            while placed[members[at_member]]:
                at_member += 1
            head = members[at_member]
            i = frame_placed[depth]
            frame_offset[depth + 1] = offset[i] if depth > 0 else 0
            frame_rank[depth + 1] = rank[i] if whole else -1
            depth += 1
            frame_p[depth], frame_q[depth], frame_head[depth] = start, end, head
            mode = enter
            frame_ordered[depth] = frame_ordered[depth - 1]
            if whole:
                continue
            num_rows = 0
            j = head
            while j != n and first[j] < end:
                num_rows += 1
                j = following[j]
            if num_rows > MANY and 10 * num_rows > 9 * frame_ordered[depth]:
                frame_rank[depth] = rank[i]
                continue
            frame_ordered[depth] = num_rows
            rows = np.empty(num_rows, dtype=np.int64)
            s = 0
            j = head
            while s < num_rows:
                rows[s] = j
                j = following[j]
                s += 1
            if num_rows > 1:
                width, levels = end - start, 1
                while (1 << levels) <= width:
                    levels += 1
                maxima = np.empty((levels, width), dtype=np.int64)
                for k in range(width):
                    maxima[0, k] = total[start + k]
                for level in range(1, levels):
                    half = 1 << (level - 1)
                    for k in range(width - 2 * half + 1):
                        maxima[level, k] = max(maxima[level - 1, k], maxima[level - 1, k + half])
                fullest = np.empty(num_rows, dtype=np.int64)
                for s in range(num_rows):
                    a, b, level = first[rows[s]] - start, last[rows[s]] - start, 0
                    while (2 << level) <= b - a:
                        level += 1
                    fullest[s] = max(maxima[level, a], maxima[level, b - (1 << level)])
                # Merge sort, runs of 1, 2, 4, ... rows: numba compiles it faster than np.argsort.
                order = np.arange(num_rows)
                merged = np.empty(num_rows, dtype=np.int64)
                run = 1
                while run < num_rows:
                    for start in range(0, num_rows, 2 * run):
                        middle, end = min(start + run, num_rows), min(start + 2 * run, num_rows)
                        a, b = start, middle
                        for k in range(start, end):
                            left = b == end
                            if a < middle and not left:
                                s, level = order[a], order[b]
                                i, j = rows[s], rows[level]
                                if before[i] != before[j]:
                                    left = before[i] < before[j]
                                elif fullest[s] != fullest[level]:
                                    left = fullest[s] > fullest[level]
                                else:
                                    left = after[i] < after[j]
                            if left:
                                merged[k] = order[a]
                                a += 1
                            else:
                                merged[k] = order[b]
                                b += 1
                    order, merged = merged, order
                    run *= 2
                for k in range(num_rows):
                    merged[k] = rows[order[k]]
                rows = merged
            if log_size + num_rows > log.shape[0]:
                more = np.empty((2 * log.shape[0] + num_rows, 3), dtype=np.int64)
                more[:log_size] = log[:log_size]
                log = more
            for s in range(num_rows):
                j = rows[s]
                log[log_size, 0], log[log_size, 1] = at_rank + j, rank[j]
                log_size += 1
                rank[j] = s
    return INFEASIBLE
