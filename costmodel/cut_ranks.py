"""One rank of pipelines that may be cut anywhere: the inequalities of `reach.py` in its layers, and
the most layers that they leave it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .graph import Array
from .rooms import Linear, Room
from .seconds import Seconds

if TYPE_CHECKING:
    from .reach import Reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Inequality:
    """constant + sum_g layers_g per_layer_g + x per_extra <= Z, for rows and one rank."""

    constant: Array
    per_layer: Array
    per_extra: Array


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
