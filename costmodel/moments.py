"""The moments of a step that can be the peak of a pipeline rank, and what is there in each.

    head      backward of the loss: everything saved, logits and their gradients
    last      backward of a rank's last layer: everything saved, that layer's working set
    second    backward of the layer before it, with the last one's gradients on the wire
    fetch     backward of the layer behind its first, whose offloaded activations come back: nothing
              else saved, all gradients but those of the two
    first     backward of its first layer: nothing else saved, all gradients
    update    the optimiser step: all states, no activations

each with the micro-batches in flight of its schedule, at the first backward of a step and at later
ones. Where the backward is split, what weights wait with is still there in a rank's first layer, of
the layers behind it. What does not depend on what layers keep (`terms`) is worked out once for all
policies; what they keep, and their working set, is added by `activations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..stack import Stack
from .copies import Owned, staged_bytes
from .graph import Array
from .kept import Kept
from .layout import Layouts
from .liveness import Liveness
from .optimizers import excess_bytes
from .options import Options
from .pieces import Pieces
from .stages import Load
from .state_bytes import StateBytes, in_units
from .states import AtRest, Counts
from .techniques.local_sgd import Held, held
from .working_copies import WorkingCopies

Kind = Literal["head", "last", "second", "fetch", "first", "update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """What depends on what layers keep, at one moment; bytes."""

    kept: Array
    """Of the micro-batch whose backward it is."""
    working: Array
    """The layer's working set beyond what it kept."""
    passing: Array
    """Of both, what waits off the device while other layers run."""
    shortfall: Array
    """How far one micro-batch's activations are below what the moment needs of them; infinite where
    the moment needs several layers of one kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A moment of a step."""

    kind: Kind
    layer: int | None
    """The group of layers whose backward it is."""
    later: bool
    """Whether in a later backward than the first one of a step."""
    exists: NDArray[np.bool_]
    """Whether the rank has it."""
    fresh: NDArray[np.bool_]
    """Whether gradients stay as they are made, instead of being added or copied away."""
    terms: dict[str, Array]
    """Bytes that do not depend on what layers keep."""

    @property
    def standing(self) -> Array:
        """All of these."""
        return sum(self.terms.values(), np.zeros(1))

    def peak_of(self, live: Liveness) -> Array:
        """The largest live sum in a piece's backward."""
        return np.where(self.fresh, live.backward_peak_fresh, live.backward_peak)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMoments:
    """The moments of one rank under many layouts."""

    moments: tuple[Moment, ...]
    load: Load
    chunks: Array
    split: NDArray[np.bool_]
    """Whether backwards are split."""
    boundary_bytes: Array
    """What a chunk hands to the next stage, of one micro-batch."""

    @staticmethod
    def of(
        load: Load, costs: Pieces, layouts: Layouts, options: Options, stack: Stack
    ) -> RankMoments:
        """The moments of ranks that hold `load`; the layers of `costs` under any policy."""
        return RankMoments(
            moments=tuple(_moments(load, costs, layouts, options, stack)),
            load=load,
            chunks=layouts.vpp.astype(float),
            split=layouts.splits,
            boundary_bytes=costs.layers[0].boundary_bytes,
        )

    def per_chunk(self, kept: Kept) -> Array:
        """Saved activations of one micro-batch through a chunk of the rank, on average.

        A chunk whose output goes to another stage keeps it until its backward, and its input as
        well: that is what its first layer keeps, unless it stores activations in another form.
        Where layers differ in that, the first is like all of them on average.
        """
        load = self.load
        total = load.embedding * kept.embedding.saved + load.head * kept.head.saved
        for count, live in zip(load.layers, kept.layers, strict=True):
            total = total + count * live.saved
        storing = sum((n for n, own in zip(load.layers, kept.stores, strict=True) if own), 0.0)
        share = storing / np.maximum(load.num_layers, 1.0)
        ends = self.chunks - load.head + (self.chunks - load.embedding) * share
        return (total + ends * self.boundary_bytes) / self.chunks

    def activations(self, moment: Moment, kept: Kept, per_chunk: Array) -> Activations:
        """What layers keep and work with at a moment."""
        load, head = self.load, self.load.head * kept.head.saved
        none = np.zeros(1)
        if moment.kind == "update":
            return Activations(kept=none, working=none, passing=none, shortfall=none)
        if moment.kind == "head":
            below = np.maximum(per_chunk - head, 0.0)
            leaving = self._leaving(kept)
            return Activations(
                kept=below + kept.head.saved - kept.head.loss + leaving,
                working=none,
                passing=leaving,
                shortfall=np.maximum(head - per_chunk, 0.0),
            )
        if moment.kind == "first":
            return self._first(moment, kept)
        if moment.kind == "fetch":
            return self._fetch(moment, kept)
        assert moment.layer is not None
        live = kept.layers[moment.layer]
        own = live.saved * (load.layers[moment.layer] > 0)
        back, more, gone = self._passing(kept, moment.layer)
        # the head's own activations are gone when the layers' backward starts
        below = np.maximum(np.maximum(per_chunk - own, 0.0) - head - gone, 0.0)
        working = np.maximum(moment.peak_of(live) - live.saved, 0.0) + more
        shortfall = np.maximum(own + head - per_chunk, 0.0)
        if moment.kind == "second":
            below = np.maximum(below - live.saved, 0.0)
            shortfall = np.full(1, np.inf)
        return Activations(
            kept=below + live.saved, working=working, passing=back + more, shortfall=shortfall
        )

    def _leaving(self, kept: Kept) -> Array:
        """What the last layer is still moving off the device when the head runs backward."""
        order, most = self.load.order, np.zeros(1)
        for group, (count, one) in enumerate(zip(self.load.layers, kept.passing, strict=True)):
            last = count > 0
            if order is not None:
                last = last & (sum(order.behind[group], np.zeros(1)) == 0)
            most = np.maximum(most, np.where(last, one.moved, 0.0))
        return most

    def _passing(self, kept: Kept, group: int) -> tuple[Array, Array, Array]:
        """In the backward of the last layer of a group that moves its activations: what is back of
        its own, in a buffer that goes as a whole; by how much that is more than is counted without
        it, with the buffer of the layer before, which is fetched meanwhile; what layers behind
        kept, which is gone."""
        lands, more = kept.passing[group].lands, kept.passing[group].more
        if not np.any(lands > 0):
            return lands, np.zeros(1), np.zeros(1)
        order = self.load.order
        fetched, gone = np.zeros(1), np.zeros(1)
        if order is None:
            for other, count in enumerate(self.load.layers):  # any other layer may be before it
                if not np.any(kept.passing[other].lands > 0):
                    continue
                there = count > (1 if other == group else 0)
                fetched = np.maximum(fetched, np.where(there, kept.passing[other].lands, 0.0))
        else:
            for there, one in zip(order.before[group], kept.passing, strict=True):
                fetched = fetched + there * one.lands
            for there, live in zip(order.behind[group], kept.layers, strict=True):
                gone = gone + there * live.saved
        return lands, np.where(lands > 0, more + fetched, 0.0), np.where(lands > 0, gone, 0.0)

    def _fetch(self, moment: Moment, kept: Kept) -> Activations:
        """In the backward of the rank's second layer while what its first moved comes back.

        Where layers offload nothing a layer's activations outweigh its gradients, so that the peak
        is at the last layer; with offload it may be at the last one that still fetches.
        """
        load, order, none = self.load, self.load.order, np.zeros(1)
        saved, working, passing = none, none, none
        groups = range(len(kept.layers))
        coming_back = [group for group in groups if np.any(kept.passing[group].lands > 0)]
        for front, own in product(coming_back, groups):
            if order is not None:
                there = order.first[front] * order.second[own] > 0
            else:
                several = load.layers[front] > (1 if own == front else 0)
                there = several & (load.layers[own] > 0)
            coming, live = kept.passing[front].lands, kept.layers[own]
            more = kept.passing[own].more + coming
            beside = np.maximum(moment.peak_of(live) - live.saved, 0.0) + more
            both = live.saved + kept.layers[front].saved
            larger = there & (coming > 0) & (both + beside > saved + working)
            saved, working = np.where(larger, both, saved), np.where(larger, beside, working)
            passing = np.where(larger, more + kept.passing[own].lands, passing)
        return Activations(kept=saved, working=working, passing=passing, shortfall=none)

    def _first(self, moment: Moment, kept: Kept) -> Activations:
        """In the backward of the rank's first layer. What came back in a buffer is copied where it
        waits for its weights' gradients."""
        saved, peak, copied = np.zeros(1), np.zeros(1), np.zeros(1)
        each = zip(self.load.layers, kept.layers, kept.passing, strict=True)
        for count, live, one in each:
            there = count > 0
            saved = np.where(there, np.maximum(saved, live.saved), saved)
            peak = np.where(there, np.maximum(peak, moment.peak_of(live)), peak)
            copied = np.where(there & self.split, np.maximum(copied, one.copied), copied)
        return Activations(
            kept=saved,
            working=np.maximum(peak - saved, 0.0) + copied,
            passing=copied,
            shortfall=np.zeros(1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gradients:
    """Gradients around one backward (bytes)."""

    before: Array
    """At rest before it, DDP's buckets included."""
    after: Array
    """At rest after it."""
    fresh: NDArray[np.bool_]
    """Whether what it makes stays as it is made, instead of being added or copied away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """Everything about one rank that its moments need."""

    load: Load
    costs: Pieces
    layouts: Layouts
    options: Options
    stack: Stack
    kept: Kept
    units: NDArray[np.bool_]
    states: StateBytes
    counts: Counts
    rest: AtRest
    copies: WorkingCopies


def _moments(
    load: Load, costs: Pieces, layouts: Layouts, options: Options, stack: Stack
) -> Iterator[Moment]:
    states, counts = StateBytes.of(stack, options), Counts.of(load, costs)
    rest = AtRest.of(counts, states, layouts, stack).on_device(options)
    more = excess_bytes(load, costs, layouts, options, stack)
    rank = _Rank(
        load=load,
        costs=costs,
        layouts=layouts,
        options=options,
        stack=stack,
        kept=Kept.of(costs, layouts, stack),
        units=in_units(layouts, options, stack),
        states=states,
        counts=counts,
        rest=replace(rest, optimizer=rest.optimizer + more),
        copies=WorkingCopies.of(load, costs, layouts, options, stack),
    )
    apart = _apart_from_others(rank)
    optimizer = rank.rest.optimizer + apart.states
    at_rest = {"parameters": rank.rest.parameters, "optimizer": optimizer}
    standing = rank.kept.sequence_buffers + _messages(rank) + apart.on_its_way
    around = _gradients(rank)
    always = np.ones(1, dtype=bool)
    for later, grads in enumerate(around):

        def moment(
            kind: Kind,
            exists: NDArray[np.bool_],
            terms: dict[str, Array],
            layer: int | None = None,
            later: bool = bool(later),
            fresh: NDArray[np.bool_] = grads.fresh,
        ) -> Moment:
            terms = {**at_rest, **terms, "comm_buffers": terms["comm_buffers"] + standing}
            return Moment(
                kind=kind, layer=layer, later=later, exists=exists, fresh=fresh, terms=terms
            )

        yield moment("head", load.head > 0, _head(rank, grads))
        for which, count in enumerate(load.layers):
            last = _layer(rank, grads)
            wire = {**last, "comm_buffers": last["comm_buffers"] + rank.copies.on_wire}
            yield moment("last", count > 0, last, which)
            yield moment("second", (count > 1) & (rank.copies.on_wire > 0), wire, which)
        several = load.num_layers > layouts.vpp
        yield moment("fetch", several, _front_layers(rank, grads, 2))
        yield moment("first", always, _front_layers(rank, grads, 1))
    exchange = rank.kept.sequence_buffers + _bucket(rank)
    exchange = exchange + np.maximum(apart.on_its_way, apart.meeting)
    staged = staged_bytes(Owned.of(counts, layouts, stack), states, options)
    terms = {
        **at_rest, "gradients": around[1].after, "comm_buffers": exchange, "workspace": staged
    }  # fmt: skip
    yield Moment(kind="update", layer=None, later=True, exists=always, fresh=always, terms=terms)


MESSAGES = 2
"""Gradients of hidden states that a chunk of a pipeline holds, one received and one on its way:
counted in runs of every schedule on two and four ranks, 1 to 4 per chunk."""
BUCKET_BYTES = 25 * 2**20
"""Of gradients that replicas of a pipeline stage sum at a time."""


def _apart_from_others(rank: _Rank) -> Held:
    """What meetings with replicas that train apart hold on a rank."""
    in_layers = np.zeros(1)
    for count, piece in zip(rank.load.layers, rank.costs.layers, strict=True):
        in_layers = in_layers + count * Counts.of_layer(piece).with_gradient
    in_ends = np.maximum(rank.counts.with_gradient - in_layers, 0.0)
    shards, layers = rank.layouts.shards, rank.load.num_layers
    return held(rank.options.local_sgd, in_layers / shards, in_ends / shards, layers)


def _messages(rank: _Rank) -> Array:
    """What a pipeline rank sends and receives, beside the activations that it keeps anyway."""
    layouts = rank.layouts
    held = MESSAGES * layouts.vpp * rank.costs.layers[0].boundary_bytes
    return np.where((layouts.pp > 1) & (rank.stack.sharding == "fsdp"), held, 0.0)


def _bucket(rank: _Rank) -> Array:
    """The bucket in which replicas of a pipeline stage sum their gradients; it takes the place of
    the gradients in it once it is filled."""
    layouts = rank.layouts
    several = layouts.dp * layouts.cp > 1
    sums = ~rank.units & several & (layouts.pp > 1) & (rank.stack.sharding == "fsdp")
    bucketed = rank.rest.whole_gradients - _apart(rank)
    return np.where(sums, np.minimum(bucketed, BUCKET_BYTES), 0.0)


def _apart(rank: _Rank) -> Array:
    """Gradients of experts that ep divides, which are summed where they lie."""
    return np.where(rank.layouts.ep > 1, rank.states.gradient * rank.counts.experts, 0.0)


def _gradients(rank: _Rank) -> tuple[_Gradients, _Gradients]:
    """Gradients around the first backward of a step, and around later ones.

    DDP's buckets, which a pipeline has none of, are always there, and with several micro-batches
    the gradients that accumulate before the exchange stand beside them; experts that ep divides are
    summed where they lie. FSDP holds sharded gradients, and unsharded ones while micro-batches
    accumulate without a scatter. Megatron-like stacks allocate one buffer for all gradients before
    the first step.
    """
    layouts, full = rank.layouts, rank.rest.whole_gradients
    if rank.stack.sharding == "megatron":
        buffer = rank.rest.gradients
        always = _Gradients(before=buffer, after=buffer, fresh=np.zeros(1, dtype=bool))
        return always, always
    m, units = layouts.num_microbatches, rank.units
    scatter_each = (layouts.zero >= 2) & (layouts.pp == 1)
    replicas, apart = layouts.dp * layouts.cp, _apart(rank)
    buckets = np.where(~units & (replicas > 1) & (layouts.pp == 1), full - apart, 0.0)
    waiting = np.where(units & ~scatter_each & (m > 1), full, rank.rest.gradients)
    local = np.where(units, waiting, full)
    after = np.where((buckets > 0) & (m == 1), buckets + apart, local + buckets)
    streams = units & scatter_each
    if rank.stack.keeps_gradients:
        always = _Gradients(before=after, after=after, fresh=streams)
        return always, always
    fresh = units | (replicas == 1) | (layouts.pp > 1)
    first = _Gradients(before=buckets, after=after, fresh=fresh)
    return first, _Gradients(before=after, after=after, fresh=streams)


def _head(rank: _Rank, grads: _Gradients) -> dict[str, Array]:
    """Backward of the loss."""
    live = rank.kept.head
    loss = rank.kept.loss_peak
    if loss is None:
        working = np.where(grads.fresh, live.backward_peak_fresh, live.backward_peak)
        working = np.maximum(working, live.forward_peak)
        loss = live.loss + np.maximum(working - live.saved, 0.0)
    return {
        "logits_loss": loss,
        "gradients": grads.before,
        "gathered_parameters": rank.copies.at_head,
        "comm_buffers": rank.copies.fetched,
    }


def _layer(rank: _Rank, grads: _Gradients) -> dict[str, Array]:
    """Backward of the rank's last layer."""
    copies = rank.copies
    own_head = rank.load.head * rank.costs.head.trainable_params
    made_head = np.where(grads.fresh, own_head * copies.gradient_bytes, 0.0)
    return {
        "gradients": grads.before + made_head,
        "gathered_parameters": copies.at_layer,
        "comm_buffers": copies.fetched_at_layer,
    }


def _front_layers(rank: _Rank, grads: _Gradients, num: int) -> dict[str, Array]:
    """Backward of the last of the rank's first `num` layers: gradients of those behind are there.

    Of activations those of these layers alone are left, and what weights of the chunk's others wait
    with; their own gradients and those of the embedding are still to be made when nothing is there
    to add them to.
    """
    load, costs = rank.load, rank.costs
    chunk = load.total(costs, "waiting_bytes") / rank.layouts.vpp
    layers = load.num_layers / rank.layouts.vpp
    behind = chunk * np.maximum(layers - num, 0.0) / np.maximum(layers, 1.0)
    waiting = np.where(rank.layouts.splits, behind, 0.0)
    params = np.zeros(1)
    for count, piece in zip(load.layers, costs.layers, strict=True):
        own = Counts.of_layer(piece).with_gradient
        params = np.where(count > 0, np.maximum(params, own), params)
    table = load.embedding * (costs.embedding.trainable_params - load.head * costs.tied_trained)
    table = np.maximum(table, 0.0)
    per_param = rank.states.gradient / rank.copies.shard
    unmade = np.where(grads.fresh, (num * params + table) * per_param, 0.0)
    return {
        "activations": waiting,
        "gradients": np.maximum(grads.after - unmade, grads.before),
        "gathered_parameters": rank.copies.at_layer,
        "comm_buffers": rank.copies.scattered,
    }
