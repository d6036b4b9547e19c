"""What memory asks of a pipeline rank whatever the cut, as linear inequalities in its layers.

A rank with n_g layers of group g, whose layers keep sum_g n_g k_g bytes of a micro-batch, has

    live sum_g n_g k_g / chunks + what stands there at a moment (linear in n) <= capacity

at the backward of a layer, of the first layer (with a micro-batch less alive), and of the head. A
layer that keeps k_g bytes takes e_g(k_g) seconds more than the least, with e_g the lower convex
hull of the policies. For any price s of a byte, with c_g(s) the least of e + s k over policies,

    x = sum_g n_g e_g(k_g) >= sum_g n_g c_g(s) - s sum_g n_g k_g

and the bytes on the right are at most what the first inequality leaves: x is bounded by a linear
function of n. Prices are the slopes of the hull of the largest group. Where even the leanest policy
must fit, n is limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from .graph import Array
from .grid_rows import Index, least_live
from .layout import Layouts
from .liveness import Liveness
from .moments import Kind
from .priced_grid import PricedGrid
from .ranks import allocated
from .stages import Load

NUM_PRICES = 3
"""Slopes of the hull that are used, from the cheapest byte on."""
MOMENTS: tuple[Kind, ...] = ("last", "first", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """constant + sum_g layers_g per_layer_g: arrays (several, rows) and (several, groups, rows)."""

    constant: Array
    per_layer: Array

    def and_(self, other: Linear) -> Linear:
        """All of these and those."""
        return Linear(
            constant=np.concatenate([self.constant, other.constant]),
            per_layer=np.concatenate([self.per_layer, other.per_layer]),
        )

    def where(self, condition: Array, other: Linear) -> Linear:
        """This in the rows where the condition holds, the other elsewhere."""
        return Linear(
            constant=np.where(condition, self.constant, other.constant),
            per_layer=np.where(condition, self.per_layer, other.per_layer),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What memory asks of one rank."""

    extra_s: Linear
    """Extra seconds of a micro-batch are no less than any of these."""
    limits: Linear
    """Layers times `per_layer` sum to `constant` at most."""

    def where(self, condition: Array, other: Room) -> Room:
        """This in the rows where the condition holds, the other elsewhere."""
        return Room(
            extra_s=self.extra_s.where(condition, other.extra_s),
            limits=self.limits.where(condition, other.limits),
        )


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """The rooms of all ranks of some rows on one pool; the last axis of every array is the row."""

    layouts: Layouts
    capacity: Array
    """Of live tensors."""
    standing: Array
    """At each of `MOMENTS`, on the first, a middle and the last rank, without layers."""
    per_layer: Array
    """What a layer of each group adds to that."""
    prices: Array
    """s."""
    costs: Array
    """c_g(s): (prices, groups, rows)."""
    least_kept: Array
    """Of a layer of each group, under the leanest policy."""
    working: Array
    """Of a layer in its backward beyond what it kept; of one with what it kept."""
    waiting: Array
    """Of a layer of each group, between the halves of a split backward."""
    ends: Array
    """Kept by embedding and head; what of the head's is the loss's."""
    ends_waiting: Array
    boundary: Array

    def take(self, rows: Index) -> Rooms:
        """Those of some rows."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        layouts = own.pop("layouts").take(rows)
        return Rooms(layouts=layouts, **{n: array[..., rows] for n, array in own.items()})

    @staticmethod
    def of(grid: PricedGrid, rows: Index, capacity_bytes: float) -> Rooms:
        """The rooms of rows of a grid."""
        num, policies = len(rows), range(len(grid.policies))
        grown, fixed = allocated(grid.prices)
        kept = [grid.kept(k, rows) for k in policies]
        pieces = [grid.pieces(k, rows) for k in policies]
        standing, per_layer, fresh = _standing(grid, rows)

        def peak(live: Liveness) -> Array:
            return np.where(fresh, live.backward_peak_fresh, live.backward_peak)

        def each(values: Sequence[Sequence[Array]]) -> Array:
            return np.stack([np.stack([x + np.zeros(num) for x in row]) for row in values])

        saved = each([[live.saved for live in x.layers] for x in kept])
        peaks = each([[peak(live) for live in x.layers] for x in kept])
        extra = grid.extra_s(rows)[:, 1:-1]
        major = int(np.argmax([layer.repeat for layer in grid.model.layers]))
        prices = _slopes(saved[:, major], extra[:, major])
        working = [np.maximum(peaks - saved, 0.0), np.maximum(peaks, saved)]
        first = pieces[0]
        return Rooms(
            layouts=grid.layouts.take(rows),
            capacity=np.full(num, (capacity_bytes - fixed) / grown),
            standing=standing,
            per_layer=per_layer,
            prices=prices,
            costs=np.min(extra + prices[:, None, None] * saved, axis=1),
            least_kept=saved.min(axis=0),
            working=np.stack([x.min(axis=(0, 1)) for x in working]),
            waiting=each([[x.waiting_bytes for x in p.layers] for p in pieces]).min(axis=0),
            ends=each([[kept[0].embedding.saved, kept[0].head.saved, kept[0].head.loss]])[0],
            ends_waiting=each([[first.embedding.waiting_bytes, first.head.waiting_bytes]])[0],
            boundary=first.layers[0].boundary_bytes + np.zeros(num),
        )

    def least_bytes(self, num_layers: int) -> Array:
        """Live tensors that no cut has fewer of: some rank holds its share of the layers, under the
        leanest policy, one chunk alive."""
        kept = self.least_kept.min(axis=0) / self.layouts.vpp
        share = np.ceil(num_layers / self.layouts.pp)
        each = self.standing[0] + share * (self.per_layer[0].min(axis=1) + kept)
        return np.maximum(each.min(axis=0) + self.working[0] - self.ends[1], 0.0)

    def scaled(self, factor: Array) -> Rooms:
        """The same with another capacity."""
        return replace(self, capacity=self.capacity * factor)

    @cached_property
    def _folded(self) -> Array:
        return self.layouts.folded

    def of_rank(self, number: int, count: int) -> Room:
        """Of rank `number`, which the first `count` rows have."""
        x = self.layouts.first(count)
        chunks, folded, ends = x.vpp.astype(float), self._folded[:count], self.ends[:, :count]
        embedding = float(number == 0)
        head = np.where(folded, embedding, x.pp - 1 == number)
        standing, per_layer = self._at(number, count)
        live, waits = least_live(x, np.full(count, float(number)))
        once = np.where(folded, head * ends[1], 0.0)  # a V's head is in flight once
        kept = embedding * ends[0] + head * ends[1] - once + (chunks - head) * self.boundary[:count]
        of_ends = embedding * self.ends_waiting[0, :count]
        of_ends = of_ends + np.where(folded, 0.0, head * self.ends_waiting[1, :count])
        waiting = waits / chunks * self.waiting[:, :count]
        # bytes of activations: share sum_g n_g k_g + the rest, at a layer's, the first, the head's
        share = np.stack([live, np.maximum(live - 1.0, 0.0), live]) / chunks
        rest = share * kept + waits / chunks * of_ends
        once = once / chunks
        beside = np.stack(
            [
                self.working[0, :count] - head * ends[1] + once,
                self.working[1, :count],
                once - ends[2],
            ]
        )
        room = self.capacity[:count] - standing - rest - beside
        room[2] = np.where(head > 0, room[2], np.inf)
        alone = x.num_microbatches * x.vpp == 1  # no backward but the first
        if alone.any():
            room = np.where(alone, np.inf, room)
        needed = per_layer + waiting
        limits = Linear(
            constant=room, per_layer=share[:, None] * self.least_kept[:, :count] + needed
        )
        bound = np.isfinite(room) & (share > 0)
        factor = self.prices[:, None, :count] / np.where(share > 0, share, 1.0)
        constant = np.where(bound, -factor * np.where(bound, room, 0.0), -np.inf)
        slopes = self.costs[:, None, :, :count] + factor[:, :, None] * needed
        slopes = np.where(bound[:, None], slopes, 0.0)
        return Room(
            extra_s=Linear(
                constant=constant.reshape(-1, count),
                per_layer=slopes.reshape(-1, slopes.shape[2], count),
            ),
            limits=limits,
        )

    def _at(self, number: int, count: int) -> tuple[Array, Array]:
        """What stands on a rank at each moment, without layers and per layer of each group."""
        if number == 0:
            return self.standing[:, 0, :count], self.per_layer[:, 0, :, :count]
        last = self.layouts.pp[:count] - 1 == number
        standing, per_layer = self.standing[:, 1, :count], self.per_layer[:, 1, :, :count]
        if last.any():
            standing = np.where(last, self.standing[:, 2, :count], standing)
            per_layer = np.where(last, self.per_layer[:, 2, :, :count], per_layer)
        return standing, per_layer


def _slopes(saved: Array, extra_s: Array) -> Array:
    """Seconds per byte along the lower hull of the policies, from the fastest one on.

    Arrays are (policies, rows); where the hull ends its last slope is repeated.
    """
    num, rows = saved.shape[1], np.arange(saved.shape[1])
    order = np.lexsort((saved, extra_s), axis=0)
    at = order[0]
    slopes = np.zeros((NUM_PRICES, num))
    for i in range(NUM_PRICES):
        less = saved[at, rows] - saved
        more = np.maximum(extra_s - extra_s[at, rows], 0.0)
        steps = np.where(less > 0, more / np.where(less > 0, less, 1.0), np.inf)
        following = np.argmin(steps, axis=0)
        step = steps[following, rows]
        ends = ~np.isfinite(step)
        slopes[i] = np.where(ends, slopes[i - 1] if i else 0.0, step)
        at = np.where(ends, at, following)
    return slopes


def _standing(grid: PricedGrid, rows: Index) -> tuple[Array, Array, Array]:
    """By moment, place (and group) and row: bytes without layers, bytes per layer; and whether
    gradients stay as they are made.

    Linear in the layers of a rank but for the largest of its layers in buffers, of which the
    smallest is taken: each group is looked at alone.
    """
    layouts, num = grid.layouts.take(rows), len(rows)
    folded = layouts.folded.astype(float)
    one, none = np.ones(num), np.zeros(num)
    places = ((one, folded), (none, none), (none, 1.0 - folded))
    groups = len(grid.model.layers)
    even = np.floor(grid.model.num_layers / layouts.pp.astype(float))
    standing = np.full((len(MOMENTS), len(places), num), np.inf)
    per_layer = np.zeros((len(MOMENTS), len(places), groups, num))
    fresh = np.zeros(num, dtype=bool)
    for place, (embedding, head) in enumerate(places):
        for group in range(groups):
            values: list[Array] = []
            for count in (even, even + 1):
                layers = tuple(count if g == group else none for g in range(groups))
                load = Load(layers=layers, embedding=embedding, head=head)
                moments = {
                    m.kind: m
                    for m in grid.moments(load, rows).moments
                    if m.later and (m.layer in (None, group))
                }
                values.append(np.stack([moments[kind].standing + none for kind in MOMENTS]))
                fresh = moments["last"].fresh
            slope = values[1] - values[0]
            per_layer[:, place, group] = slope
            standing[:, place] = np.minimum(standing[:, place], values[0] - even * slope)
    return standing, per_layer, fresh + np.zeros(num, dtype=bool)
