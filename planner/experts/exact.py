"""Exact placement of few replicas: every number of replicas, every packing, cut at the best so far.

Experts enter by falling load, each with every number of replicas whose share of the load is below
the best known; replicas of equal experts take ranks in ascending order, and of ranks that hold the
same experts only the first is tried. Branches whose remaining load exceeds the room that all ranks
have below the best known are cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .problem import Floats, Whole

BETTER = 1 - 1e-9
"""A placement counts as better when its largest load is below this share of the best."""


@dataclass(slots=True, kw_only=True)
class Exact:
    """A search on one layer; `best` improves, `effort` counts down and ends it at zero."""

    tokens: Floats
    """(E,)"""
    num_ranks: int
    num_slots: int
    most: int
    """Times that a rank may hold an expert."""
    best: float
    """Largest load of a known placement."""
    enough: float
    """A lower bound: nothing below it need be looked for."""
    effort: int
    found: list[list[int]] | None = None
    order: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def run(self) -> Whole | None:
        """Slots (R, S) better than the known placement, None if there are none."""
        self.order = np.argsort(-self.tokens, kind="stable").tolist()
        self.counts = [1] * len(self.tokens)
        self._choose(0, self.num_ranks * self.num_slots - len(self.tokens))
        return None if self.found is None else np.array(self.found, dtype=np.int64)

    @property
    def finished(self) -> bool:
        """Whether the search saw everything: the best known placement is then the best of all."""
        return self.effort > 0

    def _done(self) -> bool:
        return self.effort <= 0 or self.best <= self.enough / BETTER

    def _choose(self, position: int, spare: int) -> None:
        """Choose the replicas of the expert at `position` of the order; `spare` ones are left."""
        if self._done():
            return
        self.effort -= 1
        if position == len(self.order):
            if not spare:
                self._pack_all()
            return
        expert = self.order[position]
        after = len(self.order) - position - 1
        top = self.most * self.num_ranks
        for more in range(max(0, spare - after * (top - 1)), min(spare, top - 1) + 1):
            if self.tokens[expert] / (1 + more) < self.best * BETTER:
                self.counts[expert] = 1 + more
                self._choose(position + 1, spare - more)

    def _pack_all(self) -> None:
        share = self.tokens / np.array(self.counts)
        order = np.argsort(-share, kind="stable").tolist()
        items = [expert for expert in order for _ in range(self.counts[expert])]
        self._pack(items, share.tolist(), 0, [0.0] * self.num_ranks,
                   [[] for _ in range(self.num_ranks)])  # fmt: skip

    def _pack(
        self,
        items: list[int],
        share: list[float],
        position: int,
        load: list[float],
        held: list[list[int]],
    ) -> None:
        if position == len(items):
            self.best, self.found = max(load), [list(own) for own in held]
            return
        expert = items[position]
        own = share[expert]
        first = 0
        if position and items[position - 1] == expert:
            first = max(rank for rank in range(self.num_ranks) if expert in held[rank])
        tried: set[tuple[int, ...]] = set()
        for rank in range(first, self.num_ranks):
            contents = tuple(held[rank])
            if (
                len(contents) == self.num_slots
                or contents in tried
                or contents.count(expert) >= self.most
                or load[rank] + own >= self.best * BETTER
            ):
                continue
            if self._done():
                return
            self.effort -= 1
            tried.add(contents)
            before = load[rank]
            held[rank].append(expert)
            load[rank] = before + own
            self._pack(items, share, position + 1, load, held)
            held[rank].pop()
            load[rank] = before
