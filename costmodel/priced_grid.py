"""What the layouts of a grid cost on one pool under every policy, worked out once for rows that
agree in all that a formula depends on: pieces and what they keep per way of cutting a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from ..cluster import Pool, Profile
from ..model import Model
from .graph import Array
from .grid_rows import Index, alike, cuts_of_a_layer, in_flight_of
from .kept import Kept
from .layout import Layouts
from .memory import Peaks
from .mixtures import PARTS
from .moments import RankMoments
from .options import Options
from .pieces import Pieces
from .priced_pieces import Known, pieces, pieces_of_each
from .prices import Prices
from .ranks import rank_bytes, update
from .seconds import Seconds, joined, seconds_of
from .stages import Load
from .techniques.precision import BY_SHAPE

BLOCK_ROWS = 8192
"""Rows whose memory is computed at once: what fits the caches."""


class PricedGrid:
    """Layouts on one pool."""

    def __init__(
        self,
        model: Model,
        pool: Pool,
        profile: Profile | None,
        layouts: Layouts,
        seq_tokens: int,
        policies: Sequence[Options],
        busy_ranks: int,
        known: Known | None = None,
    ) -> None:
        """Of a pool whose processes share cores, `busy_ranks` are those of one pipeline stage; what
        is in `known` is not priced again."""
        self.model, self.layouts, self.policies = model, layouts, policies
        self._seq_tokens, self._known = seq_tokens, known
        on_a_node = pool.devices_together
        self.prices = self.alone = Prices(pool, profile, on_a_node)
        first, self.local = alike(cuts_of_a_layer(model, layouts, policies[0].balance_loss))
        self._cut = cut = layouts.take(first)
        self.costs = pieces_of_each(model, cut, seq_tokens, self.prices, policies, known)
        priced = seconds_of(self.costs)
        self.column = self.local
        """Of each row, its place in the tables of seconds."""
        if pool.shared_cores is not None:  # pipeline stages are not always all at work
            self.alone = Prices(pool, profile, busy_ranks)
            quick = seconds_of(pieces_of_each(model, cut, seq_tokens, self.alone, policies))
            priced = joined([quick, priced])
            self.column = self.local + np.where(layouts.pp == 1, len(first), 0)
        self._seconds, self._extra_s = priced
        self._at: Index | None = None
        self._there: dict[int, Pieces] = {}
        """Pieces of the rows that were last asked for, by policy."""

    @property
    def action_s(self) -> float:
        """Host time of a pipeline action."""
        return self.alone.host("pp_action")

    def seconds(self, rows: Index) -> Seconds:
        """Least seconds of every piece."""
        return self._seconds.take(self.column[rows])

    def extra_s(self, rows: Index) -> Array:
        """By policy, piece and row, seconds beyond the least."""
        return self._extra_s[:, :, self.column[rows]]

    def pieces(self, which: int, rows: Index) -> Pieces:
        """The costs under one policy; where all rows cut layers alike arrays have length one."""
        if len(self._cut) == 1:
            return self.costs[which]
        if self._at is not rows:
            self._at, self._there = rows, {}
        if which not in self._there:
            self._there[which] = self.costs[which].take(self.local[rows])
        return self._there[which]

    @cached_property
    def _kept(self) -> list[Kept]:
        stack = self.prices.pool.stack
        return [Kept.of(costs, self._cut, stack) for costs in self.costs]

    def kept(self, which: int, rows: Index) -> Kept:
        """What layers keep under one policy, likewise."""
        kept = self._kept[which]
        return kept if len(self._cut) == 1 else kept.take(self.local[rows])

    def moments(self, load: Load, rows: Index) -> RankMoments:
        """The moments of ranks with `load`, which are the same under every policy."""
        layouts, stack = self.layouts.take(rows), self.prices.pool.stack
        return RankMoments.of(load, self.pieces(0, rows), layouts, self.policies[0], stack)

    def peaks(self, ranks: Sequence[Array], loads: Sequence[Load], rows: Index) -> Peaks:
        """Bytes by policy, rank and row of ranks with their loads."""
        shape = (len(self.policies), len(loads), len(rows))
        found = {name: np.zeros(shape) for name in PARTS}
        layouts = self.layouts.take(rows)
        moments = [self.moments(load, rows) for load in loads]
        for k in range(len(self.policies)):
            kept = self.kept(k, rows)
            for r, (rank, load) in enumerate(zip(ranks, loads, strict=True)):
                flight = in_flight_of(layouts, rank, load, kept)
                peaks = rank_bytes(moments[r], kept, self.prices, flight)
                for name, values in found.items():
                    values[k, r] = getattr(peaks, name)
        return Peaks(**found)

    def updates(self, loads: Sequence[Load], rows: Index, beside: int | None = None) -> Array:
        """By load and row, the least seconds of what a rank does once per step.

        Of loads of one group of layers alone, `beside` says which: ranks may hold all layers of
        the others besides, behind whose work theirs may hide.
        """
        layouts = self.layouts.take(rows)
        least = np.full((len(loads), len(rows)), np.inf)
        for which, costs in self._hiding_pieces:
            here = costs if len(self._cut) == 1 else costs.take(self.local[rows])
            if beside is not None:
                here = _with_work_of_others(here, self.model, beside, loads[0].layers[beside])
            for i, load in enumerate(loads):
                once = update(load, here, layouts, self.prices, self.policies[which])
                least[i] = np.minimum(least[i], once.total_s)
        return least

    @cached_property
    def _hiding_pieces(self) -> list[tuple[int, Pieces]]:
        """The pieces behind whose work an exchange hides, with their policy: under a free choice of
        linears as if none ran below 16 bits, which takes the device longest. Where ranks do not
        meet on time less work may lose less at a meeting, so that both count."""
        found: list[tuple[int, Pieces]] = []
        for which in self._hiding:
            policy = self.policies[which]
            if policy.linears != BY_SHAPE or self.prices.profile is not None:
                found.append((which, self.costs[which]))
            if policy.linears == BY_SHAPE:
                wide = replace(policy, compute=policy.tensor_dtype, recipe="tensorwise",
                               linears=None)  # fmt: skip
                args = (self.model, self._cut, self._seq_tokens, self.prices, wide)
                found.append((which, pieces(*args, known=self._known)))
        return found

    @cached_property
    def _hiding(self) -> Sequence[int]:
        """The policies under which updates may be shortest: the exchange hides behind backward, so
        where ranks meet on time it is the one that recomputes most."""
        if self.prices.profile is not None:
            return range(len(self.policies))
        again = [sum(float(x.recompute_s.sum()) for x in costs.layers) for costs in self.costs]
        return (int(np.argmax(again)),)


HIDING = ("forward_s", "backward_s", "recompute_s", "host_forward_s", "host_backward_s")
"""What exchanges hide behind."""


def _with_work_of_others(costs: Pieces, model: Model, group: int, count: Array) -> Pieces:
    """Pieces in which `count` layers of a group work as long as with all layers of the others."""
    own = costs.layers[group]
    longer = {
        name: getattr(own, name)
        + sum(
            layer.repeat * getattr(costs.layers[g], name)
            for g, layer in enumerate(model.layers)
            if g != group
        )
        / np.maximum(count, 1.0)
        for name in HIDING
    }
    layers = list(costs.layers)
    layers[group] = replace(own, **longer)
    return replace(costs, layers=tuple(layers))
