"""How soon a pipeline can be done whatever its cut: lower bounds over all ways of cutting layers.

A cut gives rank r of p ranks n_r layers, in order. Every rank's chain of actions (`schedule.py`)
must end within the makespan Z; with y what leads to its first action, F and B its own work for a
micro-batch, x what dropped activations add to it, and S what leads through the stages behind it,

    gpipe              all + (m - 1) (F + B) + m x                        <= Z
    1f1b, zb-h1|h2     y + m (F + B + x) + gaps                           <= Z
                       gaps: max(0, S - (w-1) F) + max(0, S - (w-1) (B + x))
                       the larger one alone where no more than w micro-batches are there
    others             y + m (F + B + x) + max(0, path - warm-up)         <= Z

with w forwards before the first backward; `path` leads through other stages from a rank's first
forward to its first backward, which its forwards of the warm-up fill. The maxima of the first two
are several inequalities each, all linear in n_r; so are those of memory (`rooms.py`). A rank that
begins one layer later never ends earlier, so that giving every rank as many layers as it can take
reaches furthest: Z is possible if the last rank takes what is left. The least possible Z, found by
bisection, is the bound.

Chunks of a rank are as even as can be, the first ones larger, where the head is not among them.
With several pools each rank counts the times of its own; of what is behind it the faster ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..schedules import SCHEDULES
from .graph import Array
from .grid_rows import GPIPE, ZB_H2, Index
from .layout import Layouts
from .pipeline_pools import OnPool
from .rooms import Linear, Room, Rooms
from .seconds import Seconds, fastest

GAPS = tuple(map(SCHEDULES.index, ("1f1b", "zb-h1", "zb-h2")))
NEAR = 1e-3
"""Relative width of the last bracket of a bisection; its lower end is the bound."""
STEPS = 60
"""Of a bisection at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inequality:
    """constant + sum_g layers_g per_layer_g + x per_extra <= Z, for rows and one rank."""

    constant: Array
    per_layer: Array
    per_extra: Array


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Rows that may be cut anywhere, those with more ranks first."""

    layouts: Layouts
    repeats: tuple[int, ...]
    """Layers of each group of the model; one group where ranks have several chunks."""
    pools: tuple[OnPool, ...]
    rooms: tuple[Rooms, ...] = ()
    """By pool; none where memory is no matter."""

    def __post_init__(self) -> None:
        assert np.all(np.diff(self.layouts.pp) <= 0)

    def take(self, rows: Index) -> Reach:
        """Some of the rows, in ascending order."""
        if len(rows) == len(self.layouts):
            return self
        return Reach(
            layouts=self.layouts.take(rows),
            repeats=self.repeats,
            pools=tuple(pool.take(rows) for pool in self.pools),
            rooms=tuple(rooms.take(rows) for rooms in self.rooms),
        )

    @cached_property
    def known_rooms(self) -> dict[int, Room]:
        """What memory asks of ranks by their number, as far as it was worked out: it is the same at
        every makespan."""
        return {}

    @cached_property
    def split(self) -> NDArray[np.bool_]:
        """Whether the backward is split, so that forwards alone lead to the next rank."""
        return self.layouts.splits

    @cached_property
    def folded(self) -> NDArray[np.bool_]:
        """Whether stages are placed in a V."""
        return self.layouts.folded

    @cached_property
    def flat(self) -> NDArray[np.bool_]:
        """Whether all forwards come before all backwards."""
        return self.layouts.schedule == GPIPE

    @cached_property
    def gaps(self) -> NDArray[np.bool_]:
        """Whether the gaps of a rank are known whatever the cut."""
        return np.isin(self.layouts.schedule, GAPS)

    @cached_property
    def per_hop(self) -> Array:
        """Forwards of the warm-up per rank that is behind."""
        return np.where(self.layouts.schedule == ZB_H2, 2.0, 1.0)

    @cached_property
    def micro_batches(self) -> Array:
        """Per step."""
        return self.layouts.num_microbatches.astype(float)

    @cached_property
    def chunks(self) -> Array:
        """Per rank, a layer each at least."""
        return self.layouts.vpp.astype(float)

    @cached_property
    def later(self) -> list[Seconds]:
        """By pool, the least seconds on it and those behind it."""
        return [fastest([p.seconds for p in self.pools[k:]]) for k in range(len(self.pools))]

    @cached_property
    def flat_lead_s(self) -> Array:
        """Everything once, on the fastest pools, and all transfers: what leads a gpipe."""
        times = np.array([1.0, *self.repeats, 1.0])
        p, every = self.layouts.pp, self.later[0]
        action_s = min(pool.action_s for pool in self.pools)
        hop_s = np.min([pool.hop_s for pool in self.pools], axis=0)
        return times @ every.both + 2 * p * action_s + 2 * (p - 1) * hop_s

    def least_s(self, low_s: Array, high_s: Array) -> Array:
        """A bound of each row's makespan, no less than `low_s`, which is one.

        What cannot be done by `high_s` is not looked at further. Infinite where no cut has the
        memory.
        """
        low, high = low_s.copy(), high_s.copy()
        if np.all(np.isfinite(high_s)):
            possible = self.feasible(high)
            low = np.where(possible, low, np.maximum(low, high))
        else:
            low, high = self._bracket(low)
            possible = np.isfinite(high)
        open_ = np.flatnonzero(possible)
        part = self.take(open_)
        for _ in range(STEPS):
            left = np.flatnonzero(high[open_] > low[open_] * (1 + NEAR))
            if not len(left):
                break
            if len(left) < len(open_) / 2:  # else what is known of all rows is worth more
                open_, part = open_[left], part.take(left)
            middle = (low[open_] + high[open_]) / 2
            possible = part.feasible(middle)
            high[open_] = np.where(possible, middle, high[open_])
            low[open_] = np.where(possible, low[open_], middle)
        return low

    def _bracket(self, low: Array) -> tuple[Array, Array]:
        """Times that are not and that are possible, both infinite where none is."""
        never = ~self.feasible(np.full(len(low), np.inf))
        low = np.where(never, np.inf, low)
        high = np.where(never, np.inf, 1.1 * low)
        open_ = np.flatnonzero(~never)
        part = self.take(open_)
        for _ in range(STEPS):
            left = np.flatnonzero(~part.feasible(high[open_]))
            open_ = open_[left]
            if not len(open_):
                break
            part = part.take(left)
            low[open_] = high[open_]
            high[open_] = 1.5 * high[open_]
        return low, high

    def least_share(self) -> Array:
        """A bound of the capacity that any cut needs, as a share of what there is."""
        low, high = np.zeros(len(self.layouts)), np.ones(len(self.layouts))
        always = np.full(len(self.layouts), np.inf)
        for _ in range(STEPS):
            possible = self._scaled(high).feasible(always)
            low, high = np.where(possible, low, high), np.where(possible, high, 2 * high)
            if possible.all():
                break
        while np.any(high > low * (1 + NEAR) + 1e-6):
            middle = (low + high) / 2
            possible = self._scaled(middle).feasible(always)
            low, high = np.where(possible, low, middle), np.where(possible, middle, high)
        return low

    def _scaled(self, factor: Array) -> Reach:
        return replace(self, rooms=tuple(rooms.scaled(factor) for rooms in self.rooms))

    def feasible(self, makespan_s: Array) -> NDArray[np.bool_]:
        """Whether some cut may be done by then."""
        num = len(self.layouts)
        used = np.zeros((len(self.repeats), num))
        repeats = np.asarray(self.repeats, dtype=float)[:, None]
        lead = np.where(self.flat, self.flat_lead_s, 0.0)
        chunked = bool(np.any(self.chunks > 1))
        before = Before.none(num)
        possible = np.ones(num, dtype=bool)
        ranks = np.arange(int(self.layouts.pp.max(initial=0)))
        for r, count in enumerate(np.searchsorted(-self.layouts.pp, -ranks, side="left")):
            here = slice(0, int(count))
            left = repeats - used[:, here]
            rank = Rank.of(self, r, int(count))
            most = rank.most_layers(makespan_s[here], lead[here], left)
            rest = left.sum(axis=0)
            if chunked:
                some = before.first(int(count))
                most = rank.trimmed(most, makespan_s[here], lead[here], rest, some)
                before.add(rank, np.minimum(most, rest))
            last = rank.behind == 0
            possible[here] &= most >= np.where(last, rest, rank.chunks)
            taken = np.maximum(np.minimum(most, rest - rank.chunks * rank.behind), 0.0)
            by_group = _in_order(taken, left)
            used[:, here] += by_group
            lead[here] += rank.lead_s(by_group)
        return possible


@dataclass(kw_only=True)
class Before:
    """Layers of the first and of the last chunks of earlier ranks, of rows with several chunks."""

    first_most: Array
    """The first chunk of a V's first rank, which has the head in its other one, at most."""
    last: Array

    @staticmethod
    def none(num: int) -> Before:
        """Of no rank."""
        return Before(first_most=np.zeros(num), last=np.zeros(num))

    def first(self, count: int) -> Before:
        """Of the first rows."""
        return Before(first_most=self.first_most[:count], last=self.last[:count])

    def add(self, rank: Rank, layers: Array) -> None:
        """Add a rank with its layers."""
        here = slice(0, rank.count)
        first, last = rank.ends_of(layers)
        self.first_most[here] += np.where(rank.has_head, layers - 1, first)
        self.last[here] += np.where(rank.has_head, 1.0, last)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank of the rows that have it."""

    reach: Reach
    number: int
    count: int
    """Those rows come first."""
    seconds: Seconds
    later: Seconds
    """The least on the pools of this rank and behind it."""
    hop_s: Array
    action_s: Array | float

    @staticmethod
    def of(reach: Reach, number: int, count: int) -> Rank:
        """Rank `number`, which the first `count` rows have."""
        first = reach.pools[0]
        seconds, hop = first.seconds.first(count), first.hop_s[:count]
        later, action = reach.later[0].first(count), first.action_s
        for k, pool in enumerate(reach.pools[1:], start=1):
            past = number >= reach.pools[k - 1].until_rank[:count]
            seconds = pool.seconds.first(count).where(past, seconds)
            later = reach.later[k].first(count).where(past, later)
            hop = np.where(past, pool.hop_s[:count], hop)
            action = np.where(past, pool.action_s, action)
        return Rank(
            reach=reach, number=number, count=count, seconds=seconds, later=later, hop_s=hop,
            action_s=action,
        )  # fmt: skip

    @property
    def chunks(self) -> Array:
        """Chunks of the rank."""
        return self.reach.chunks[: self.count]

    @cached_property
    def behind(self) -> Array:
        """Ranks after this one."""
        return self.reach.layouts.pp[: self.count] - 1.0 - self.number

    @property
    def split(self) -> NDArray[np.bool_]:
        """Whether the backward is split."""
        return self.reach.split[: self.count]

    @cached_property
    def has_head(self) -> NDArray[np.bool_]:
        """Whether the head lies here."""
        return np.where(self.reach.folded[: self.count], self.number == 0, self.behind == 0)

    def ends_of(self, layers: Array) -> tuple[Array, Array]:
        """Layers of the first and the last chunk, of so many in all."""
        return np.ceil(layers / self.chunks), np.floor(layers / self.chunks)

    def _own(self) -> tuple[Array, Array]:
        """Seconds of forward and backward besides layers."""
        head = self.has_head
        actions = self.chunks * self.action_s
        forward = head * self.seconds.forward[-1] + actions
        backward = head * self.seconds.backward[-1] + actions
        if self.number == 0:
            forward, backward = (
                forward + self.seconds.forward[0],
                backward + self.seconds.backward[0],
            )
        return forward, backward

    def lead_s(self, layers: Array) -> Array:
        """What this rank adds to the way to the next rank's first action, and back: its first
        chunk, which no other one is larger than."""
        once = np.where(self.split, 0.0, 1.0)
        both = self.seconds.forward + once * self.seconds.backward
        first = np.ceil(layers / self.chunks) if len(layers) == 1 else layers
        step = _dot(first, both[1:-1])
        step = step + (1 + once) * (self.action_s + self.hop_s)
        if self.number == 0:
            step = step + both[0]
        return np.where(self.reach.flat[: self.count], 0.0, step)

    def inequalities(self, lead_s: Array, left: Array) -> Iterator[Inequality]:
        """What must hold of a makespan, in the layers of the rank and its extra seconds."""
        m, gaps = self.reach.micro_batches[: self.count], self.reach.gaps[: self.count]
        forward, backward = self._own()
        layers = self.seconds.forward[1:-1] + self.seconds.backward[1:-1]
        times = m - self.reach.flat[: self.count]
        constant, per_layer = lead_s + times * (forward + backward), times * layers
        yield Inequality(constant=constant, per_layer=per_layer, per_extra=m)
        if not gaps.any():
            return
        later = self.later
        back = np.where(self.split, later.inputs, later.backward)
        behind = later.forward + back
        through = _dot(left, behind[1:-1]) + (self.behind > 0) * behind[-1]
        through = through + 2 * self.behind * (self.action_s + self.hop_s)
        through = np.where(gaps, through, -np.inf)
        others = np.minimum(m, self.reach.per_hop[: self.count] * self.behind + 1) - 1
        f0, f1 = others * forward, others * self.seconds.forward[1:-1] + behind[1:-1]
        b0, b1 = others * backward, others * self.seconds.backward[1:-1] + behind[1:-1]
        extra = m - others
        yield Inequality(constant=constant + through - f0, per_layer=per_layer - f1, per_extra=m)
        yield Inequality(
            constant=constant + through - b0, per_layer=per_layer - b1, per_extra=extra
        )
        two = extra > 1  # the gaps before the first backward and before the last one are apart
        yield Inequality(
            constant=np.where(two, constant + 2 * through - f0 - b0, -np.inf),
            per_layer=np.where(two, per_layer - f1 - b1, 0.0),
            per_extra=extra,
        )

    def most_layers(self, makespan_s: Array, lead_s: Array, left: Array) -> Array:
        """The most layers that the rank can take, out of those left in order."""
        most = left.sum(axis=0)
        room = self._room()
        for rule in self.inequalities(lead_s, left):
            budget = makespan_s - rule.constant
            if room is None:
                found = _advance(budget, rule.per_layer, left)
            else:
                more = room.extra_s
                found = _advance(
                    budget - rule.per_extra * more.constant,
                    rule.per_layer + rule.per_extra * more.per_layer,
                    left,
                ).min(axis=0)
            most = np.minimum(most, found)
        if room is not None:
            limits = room.limits
            most = np.minimum(most, _advance(limits.constant, limits.per_layer, left).min(axis=0))
        return most

    def trimmed(
        self, most: Array, makespan_s: Array, lead_s: Array, rest: Array, before: Before
    ) -> Array:
        """`most`, of rows with several chunks lowered to what the gap before the first backward
        leaves; `rest` layers are left in all."""
        inside = self.has_gap
        if not inside.any():
            return most
        room = self._room()
        forward, backward = self._own()
        m, both = self.reach.micro_batches[: self.count], self.seconds.both[1]
        layers = most
        open_ = inside & (layers >= self.chunks)
        while open_.any():
            extra = 0.0
            if room is not None:
                more = room.extra_s
                extra = np.max(more.constant + layers * more.per_layer[:, 0], axis=0)
            gap = self.gap_s(layers, rest, before)
            ends = lead_s + m * (forward + backward + layers * both + extra) + gap
            open_ = open_ & (ends > makespan_s * (1 + 1e-12)) & (layers >= self.chunks)
            layers = np.where(open_, layers - 1, layers)
        return layers

    @cached_property
    def has_gap(self) -> NDArray[np.bool_]:
        """Whether `gap_s` is known: of ranks with several chunks, but for the head's."""
        return (self.chunks > 1) & (self.behind > 0) & ~self.has_head

    def gap_s(self, layers: Array, rest: Array, before: Before) -> Array:
        """What a rank with several chunks waits for its first backward."""
        return np.maximum(self._path_s(layers, rest, before) - self._warm_up_s(layers), 0.0)

    def _path_s(self, layers: Array, rest: Array, before: Before) -> Array:
        """What leads from the end of the rank's first forward to its first backward."""
        later, folded = self.later, self.reach.folded[: self.count]
        first, _ = self.ends_of(layers)
        total = self.reach.repeats[0] - before.first_most - first
        there = total * later.forward[1] + later.forward[-1]
        back = np.where(self.split, later.inputs, later.backward)
        behind = np.maximum(
            (rest - layers - (self.chunks - 1) * self.behind) / self.chunks, self.behind
        )
        looped = behind * back[1]
        actions = (self.reach.layouts.pp[: self.count] * self.chunks - 1 - self.number) + np.where(
            folded, self.number, self.behind
        )
        way = there + np.where(folded, before.last * back[1], looped) + back[-1]
        return way + actions * self.action_s

    def _warm_up_s(self, layers: Array) -> Array:
        """The rank's forwards after its first one and before its first backward."""
        first, last = self.ends_of(layers)
        f, action_s = self.seconds.forward[1], self.action_s
        x = self.reach.layouts
        p, m = x.pp[: self.count].astype(float), self.reach.micro_batches[: self.count]
        v, forward = self.chunks, self._own()[0]
        folded, split = self.reach.folded[: self.count], self.split
        down = np.minimum(m, 2 * p - 1 - self.number + (self.number == p - 1)) - 1
        in_v = down * (first * f + action_s) + (self.number + 1) * (last * f + action_s)
        in_rounds = p * (layers * f + forward) - (first * f + action_s)
        in_rounds = in_rounds - self.number * (last * f + action_s)
        count = np.minimum((v - 1) * p + 2 * self.behind, m * v - 1)
        whole = count * (first * f + action_s)
        return np.where(folded, in_v, np.where(split, in_rounds, whole))

    def _room(self) -> Room | None:
        if not self.reach.rooms:
            return None
        known = self.reach.known_rooms
        if self.number not in known:
            known[self.number] = self._worked_out()
        return known[self.number]

    def _worked_out(self) -> Room:
        rooms, pools = self.reach.rooms, self.reach.pools
        room = rooms[0].of_rank(self.number, self.count)
        for before, own in zip(pools, rooms[1:], strict=False):
            past = self.number >= before.until_rank[: self.count]
            room = own.of_rank(self.number, self.count).where(past, room)
        none = Linear(
            constant=np.zeros((1, self.count)), per_layer=0.0 * room.extra_s.per_layer[:1]
        )
        return Room(extra_s=none.and_(room.extra_s), limits=room.limits)


def _dot(layers: Array, each: Array) -> Array:
    """The sum over groups."""
    if len(layers) == 1:
        return layers[0] * each[0]
    return np.einsum("gr,gr->r", layers, each)


def _advance(budget: Array, per_layer: Array, left: Array) -> Array:
    """How many layers, in order, budgets (..., rows) pay for, at (..., groups, rows) a layer."""
    total: Array | float = 0.0
    going: NDArray[np.bool_] | bool = True
    for group, there in enumerate(left):
        one = np.maximum(per_layer[..., group, :], TINY)
        many = np.floor(budget / one * (1 + 1e-12) + 1e-9)
        taken = np.minimum(np.maximum(many, 0.0), there)
        if len(left) == 1:
            return taken
        taken = np.where(going, taken, 0.0)
        total = total + taken
        going = going & (taken >= there)
        budget = budget - taken * one
    return np.asarray(total)


TINY = 1e-30
"""Seconds or bytes of a layer that costs nothing."""


def _in_order(number: Array, left: Array) -> Array:
    """The first `number` layers of those left, by group."""
    if len(left) == 1:
        return number[None]
    before = np.cumsum(left, axis=0) - left
    return np.minimum(np.maximum(number - before, 0.0), left)
