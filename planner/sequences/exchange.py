"""Sequences moved out of the slowest group, or swapped with another group's, while that helps.

From groups S_g of degree d(g), with load_g = c + sum t[i, d(g)], and g* the slowest, take the move
or swap that minimises the larger load of the two groups,

    move i from g* to h:      load_h + t[i, d(h)]
    swap i of g* with j of h: max(load_g* - t[i] + t[j, d(g*)],  load_h - t[j] + t[i, d(h)])

as long as it is below load_g* and the tokens fit. Swaps are looked for among the sequences of the
groups that are done first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .costs import Costs, Floats, Ints

MOST_STEPS = 300
PARTNERS = 48
"""Groups, those done first, whose sequences are looked at for swaps."""


def improve(
    groups: Sequence[tuple[int, Sequence[int]]], lengths: Ints, seconds: Floats, costs: Costs,
    enough_s: float = 0.0,
) -> list[tuple[int, list[int]]]:  # fmt: skip
    """Groups (degree index, positions) whose slowest is no slower than that of `groups`.

    Ends early once the slowest takes `enough_s` or less.
    """
    state = _State(groups, lengths, seconds, costs)
    for _ in range(MOST_STEPS):
        if state.load.max() <= enough_s or not state.step():
            break
    return [(int(d), np.flatnonzero(state.owner == g).tolist())
            for g, d in enumerate(state.degree)]  # fmt: skip


class _State:
    """Owner of each sequence; load and room of each group."""

    def __init__(
        self,
        groups: Sequence[tuple[int, Sequence[int]]],
        lengths: Ints,
        seconds: Floats,
        costs: Costs,
    ) -> None:
        self.lengths, self.seconds = lengths, seconds
        self.degree = np.array([d for d, _ in groups])
        self.owner = np.empty(len(lengths), dtype=np.int64)
        for g, (_, members) in enumerate(groups):
            self.owner[list(members)] = g
        self.own_s = seconds[np.arange(len(lengths)), self.degree[self.owner]]
        self.load = np.array(costs.pass_s)[self.degree]
        np.add.at(self.load, self.owner, self.own_s)
        self.room = np.array(costs.capacity_tokens, dtype=np.int64)[self.degree]
        np.subtract.at(self.room, self.owner, lengths)

    def step(self) -> bool:
        """The best exchange of the slowest group, if one helps."""
        slow = int(np.argmax(self.load))
        out = np.flatnonzero(self.owner == slow)
        reached = self.load[slow] * (1 - 1e-9)
        move_s, moved, target = self._best_move(out, slow)
        swap_s, given, taken = self._best_swap(out, slow)
        if min(move_s, swap_s) >= reached:
            return False
        if move_s <= swap_s:
            self._give(moved, target)
        else:
            target = int(self.owner[taken])
            self._give(taken, slow)
            self._give(given, target)
        return True

    def _best_move(self, out: Ints, slow: int) -> tuple[float, int, int]:
        there = self.load[None, :] + self.seconds[out][:, self.degree]
        there = np.where(self.room[None, :] >= self.lengths[out][:, None], there, np.inf)
        there[:, slow] = np.inf
        i, h = divmod(int(np.argmin(there)), there.shape[1])
        return float(there[i, h]), int(out[i]), h

    def _best_swap(self, out: Ints, slow: int) -> tuple[float, int, int]:
        near = np.zeros(len(self.load), dtype=bool)
        near[np.argsort(self.load, kind="stable")[:PARTNERS]] = True
        near[slow] = False
        others = np.flatnonzero(near[self.owner])
        if not len(others) or not len(out):
            return np.inf, -1, -1
        owner, d_slow = self.owner[others], self.degree[slow]
        change = self.lengths[out][:, None] - self.lengths[others][None, :]
        here = self.load[slow] - self.own_s[out][:, None] + self.seconds[others, d_slow][None, :]
        there = (self.load[owner] - self.own_s[others])[None, :]
        there = there + self.seconds[out][:, self.degree[owner]]
        fits = (change <= self.room[owner][None, :]) & (-change <= self.room[slow])
        larger = np.where(fits, np.maximum(here, there), np.inf)
        i, j = divmod(int(np.argmin(larger)), larger.shape[1])
        return float(larger[i, j]), int(out[i]), int(others[j])

    def _give(self, i: int, target: int) -> None:
        source = self.owner[i]
        self.load[source] -= self.own_s[i]
        self.room[source] += self.lengths[i]
        self.own_s[i] = self.seconds[i, self.degree[target]]
        self.load[target] += self.own_s[i]
        self.room[target] -= self.lengths[i]
        self.owner[i] = target
