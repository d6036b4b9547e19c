"""Peak memory of one pipeline rank, by category: the moments at which it can occur, and the
largest.

What lies at rest is in `states.py`, what a micro-batch keeps in `liveness.py` and `kept.py`, copies
of parameters in use in `working_copies.py`. The moments of a step that can be the peak are

    head      backward of the loss: everything saved, logits and their gradients
    last      backward of a rank's last layer: everything saved, that layer's working set
    second    backward of the layer before it, with the last one's gradients on the wire
    first     backward of its first layer: nothing else saved, all gradients
    update    the optimiser step: all states, no activations

each with the micro-batches in flight of its schedule. Where the backward is split, what weights
wait with is still there in its first layer, of the layers behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..estimate import MEMORY_TERMS
from ..plan import SCHEDULES, SPLIT_SCHEDULES
from ..stack import Stack
from .graph import Array
from .kept import Kept
from .layout import Layouts
from .liveness import Liveness
from .options import Options
from .pieces import Pieces
from .stages import Load
from .state_bytes import StateBytes, in_units
from .states import AtRest, Counts, Divisors
from .techniques import expert_offload
from .working_copies import WorkingCopies


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The largest moment: its terms (bytes), which sum to `total`."""

    total: Array
    terms: dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """Everything about one rank that its moments need."""

    load: Load
    costs: Pieces
    layouts: Layouts
    options: Options
    stack: Stack
    kept: Kept
    states: StateBytes
    counts: Counts
    rest: AtRest
    copies: WorkingCopies

    @staticmethod
    def of(load: Load, costs: Pieces, layouts: Layouts, options: Options, stack: Stack) -> _Rank:
        states = StateBytes.of(stack, options)
        counts = Counts.of(load, costs)
        hosted = expert_offload.MOMENT_BYTES if options.expert_offload else 0.0
        return _Rank(
            load=load,
            costs=costs,
            layouts=layouts,
            options=options,
            stack=stack,
            kept=Kept.of(costs, layouts, stack),
            states=states,
            counts=counts,
            rest=AtRest.of(counts, states, layouts, stack, hosted),
            copies=WorkingCopies.of(load, costs, layouts, options, stack),
        )

    def each_layer(self) -> list[tuple[Array, Liveness]]:
        """The live bytes of each kind of layer with its count."""
        return list(zip(self.load.layers, self.kept.layers, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """Live chunk activations of a rank at its first backward of a step (no gradients yet), and at
    later ones; zero where there is none, or none is looked at."""

    first: Array
    later: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """A moment of a step."""

    exists: NDArray[np.bool_]
    terms: dict[str, Array]
    """Bytes."""
    shortfall: Array
    """How far one micro-batch's activations are below what the moment needs of them; infinite where
    the moment needs several layers of one kind."""


def peak_memory(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    *,
    options: Options,
    stack: Stack,
    in_flight: InFlight,
) -> Peak:
    """Live tensors at the peak of one pipeline rank; `load` is all chunks of the rank."""
    rank = _Rank.of(load, costs, layouts, options, stack)
    per_chunk = _saved(rank) / layouts.vpp
    moments = [
        {name: np.where(moment.exists, value, 0.0) for name, value in moment.terms.items()}
        for _, moment in _every_moment(rank, per_chunk, in_flight)
    ]
    return _largest(moments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """Bytes of one rank under many layouts; the peak is one of two kinds of moments."""

    total: Array
    """The peak."""
    kept: Array
    """What live micro-batches keep while the head or any layer runs backward."""
    working: Array
    """The most that is there beside `kept` then."""
    closing: Array
    """What is there in the backward of the rank's first layer, or after it, beside `kept` of the
    other micro-batches."""
    others: Array
    """These others as a share of all live micro-batches."""


def peak_bytes(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    *,
    options: Options,
    stack: Stack,
    in_flight: InFlight,
) -> Peaks:
    """The total of `peak_memory`, and what it consists of."""
    rank = _Rank.of(load, costs, layouts, options, stack)
    per_chunk = _saved(rank) / layouts.vpp
    later = np.where(in_flight.later > 0, in_flight.later, in_flight.first)
    live = np.where(in_flight.first > 0, np.minimum(in_flight.first, later), later)
    others = np.maximum(live - 1.0, 0.0)
    peak, working, closing = np.zeros((3, len(layouts)))
    for whole, moment in _every_moment(rank, per_chunk, in_flight):
        now = np.where(moment.exists, sum(moment.terms.values(), np.zeros(1)), 0.0)
        peak = np.maximum(peak, now)
        if whole:
            working = np.maximum(working, now - live * per_chunk - moment.shortfall)
        short = (moment.shortfall > 0) & np.isfinite(moment.shortfall)
        closing = np.maximum(closing, np.where(short | (not whole), now - others * per_chunk, 0.0))
    return Peaks(
        total=peak,
        kept=live * per_chunk,
        working=working,
        closing=closing,
        others=others / np.maximum(live, 1.0),
    )


def _every_moment(
    rank: _Rank, per_chunk: Array, in_flight: InFlight
) -> Iterator[tuple[bool, _Moment]]:
    """The candidate moments of a step, and whether all live micro-batches are whole then."""
    rest = {"parameters": rank.rest.parameters, "optimizer": rank.rest.optimizer}
    standing = rank.kept.sequence_buffers + _messages(rank)
    first, later = _gradients(rank)
    for live, grads in ((in_flight.first, first), (in_flight.later, later)):
        others = np.maximum(live - 1.0, 0.0) * per_chunk
        *whole, closing = _moments(rank, per_chunk, grads)
        for is_whole, moment in [*((True, m) for m in whole), (False, closing)]:
            terms = {**rest, **moment.terms}
            terms["activations"] = terms["activations"] + others
            terms["comm_buffers"] = terms["comm_buffers"] + standing
            yield is_whole, replace(moment, exists=(live > 0) & moment.exists, terms=terms)
    exchange = rank.kept.sequence_buffers + _bucket(rank)
    terms = {**rest, "gradients": later.after, "comm_buffers": exchange}
    if rank.options.expert_offload:
        terms["workspace"] = expert_offload.piece_bytes(_largest_expert_tensor(rank))
    yield False, _always(terms)


def _largest_expert_tensor(rank: _Rank) -> Array:
    """Parameters of the largest tensor of experts that the rank owns a part of."""
    owned = Divisors.of(rank.stack, rank.layouts, experts=True).optimizer
    largest = np.zeros(1)
    for count, piece in zip(rank.load.layers, rank.costs.layers, strict=True):
        one = piece.trainable_expert_params / max(1, piece.expert_tensors) / owned
        largest = np.where(count > 0, np.maximum(largest, one), largest)
    return largest


SPLIT = [SCHEDULES.index(name) for name in SPLIT_SCHEDULES]
MESSAGES = 2
"""Gradients of hidden states that a chunk of a pipeline holds, one received and one on its way:
counted in runs of every schedule on two and four ranks, 1 to 4 per chunk."""
BUCKET_BYTES = 25 * 2**20
"""Of gradients that replicas of a pipeline stage sum at a time."""


def _messages(rank: _Rank) -> Array:
    """What a pipeline rank sends and receives, beside the activations that it keeps anyway."""
    layouts = rank.layouts
    held = MESSAGES * layouts.vpp * rank.costs.layers[0].boundary_bytes
    return np.where((layouts.pp > 1) & (rank.stack.sharding == "fsdp"), held, 0.0)


def _bucket(rank: _Rank) -> Array:
    """The bucket in which replicas of a pipeline stage sum their gradients; it takes the place of
    the gradients in it once it is filled."""
    layouts = rank.layouts
    sums = ~in_units(layouts, rank.options, rank.stack) & (layouts.dp > 1) & (layouts.pp > 1)
    sums = sums & (rank.stack.sharding == "fsdp")
    bucketed = rank.rest.whole_gradients - _apart(rank)
    return np.where(sums, np.minimum(bucketed, BUCKET_BYTES), 0.0)


def _apart(rank: _Rank) -> Array:
    """Gradients of experts that ep divides, which are summed where they lie."""
    return np.where(rank.layouts.ep > 1, rank.states.gradient * rank.counts.experts, 0.0)


def _always(terms: dict[str, Array]) -> _Moment:
    return _Moment(exists=np.ones(1, dtype=bool), terms=terms, shortfall=np.zeros(1))


def _saved(rank: _Rank) -> Array:
    """Saved activations of one micro-batch through all chunks of the rank.

    A chunk whose output goes to another stage keeps it until its backward.
    """
    load, kept = rank.load, rank.kept
    sent = (rank.layouts.vpp - load.head) * rank.costs.layers[0].boundary_bytes
    total = load.embedding * kept.embedding.saved + load.head * kept.head.saved
    for count, live in rank.each_layer():
        total = total + count * live.saved
    return total + sent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gradients:
    """Gradients around one backward (bytes)."""

    before: Array
    """At rest before it, DDP's buckets included."""
    after: Array
    """At rest after it."""
    fresh: Array
    """Whether what it makes stays as it is made, instead of being added or copied away."""


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
    m = layouts.num_microbatches
    units = in_units(layouts, rank.options, rank.stack)
    scatter_each = (layouts.zero >= 2) & (layouts.pp == 1)
    apart = _apart(rank)
    buckets = np.where(~units & (layouts.dp > 1) & (layouts.pp == 1), full - apart, 0.0)
    waiting = np.where(units & ~scatter_each & (m > 1), full, rank.rest.gradients)
    local = np.where(units, waiting, full)
    after = np.where((buckets > 0) & (m == 1), buckets + apart, local + buckets)
    streams = units & scatter_each
    if rank.stack.keeps_gradients:
        always = _Gradients(before=after, after=after, fresh=streams)
        return always, always
    fresh = units | (layouts.dp == 1) | (layouts.pp > 1)
    first = _Gradients(before=buckets, after=after, fresh=fresh)
    return first, _Gradients(before=after, after=after, fresh=streams)


def _moments(rank: _Rank, per_chunk: Array, grads: _Gradients) -> list[_Moment]:
    """The candidate moments of one micro-batch's backward on this rank."""
    result = [_head(rank, per_chunk, grads)]
    for count, live in rank.each_layer():
        result += _layer(rank, count, live, per_chunk, grads)
    return [*result, _always(_first_layer(rank, grads))]


def _head(rank: _Rank, per_chunk: Array, grads: _Gradients) -> _Moment:
    """Backward of the loss."""
    present, live = rank.load.head > 0, rank.kept.head
    working = np.where(grads.fresh, live.backward_peak_fresh, live.backward_peak)
    working = np.maximum(working, live.forward_peak)
    below = np.maximum(per_chunk - live.saved * present, 0.0)
    loss = rank.kept.loss_peak
    if loss is None:
        loss = live.loss + np.maximum(working - live.saved, 0.0)
    terms = {
        "activations": below + live.saved - live.loss,
        "logits_loss": loss,
        "gradients": grads.before,
        "gathered_parameters": rank.copies.at_head,
        "comm_buffers": rank.copies.fetched,
    }
    shortfall = np.maximum(live.saved * present - per_chunk, 0.0)
    return _Moment(exists=present, terms=terms, shortfall=shortfall)


def _layer(
    rank: _Rank, count: Array, live: Liveness, per_chunk: Array, grads: _Gradients
) -> list[_Moment]:
    """Backward of the rank's last layer, if it is of this kind, and of the one before it."""
    copies, head = rank.copies, rank.load.head
    present, own = count > 0, live.saved
    working = np.where(grads.fresh, live.backward_peak_fresh, live.backward_peak)
    # the head's own activations are gone when the layers' backward starts
    below = np.maximum(per_chunk - own * present, 0.0)
    below = np.maximum(below - head * rank.kept.head.saved, 0.0)
    own_head = head * rank.costs.head.trainable_params
    made_head = np.where(grads.fresh, own_head * copies.gradient_bytes, 0.0)
    last = {
        "activations": below + own,
        "workspace": np.maximum(working - own, 0.0),
        "gradients": grads.before + made_head,
        "gathered_parameters": copies.at_layer,
        "comm_buffers": copies.fetched_at_layer,
    }
    second = {
        **last,
        "activations": np.maximum(below - own, 0.0) + own,
        "comm_buffers": copies.fetched_at_layer + copies.on_wire,
    }
    beside = present & (count > 1) & (copies.on_wire > 0)
    needed = own * present + head * rank.kept.head.saved
    shortfall = np.maximum(needed - per_chunk, 0.0)
    several = np.full(1, np.inf)
    return [
        _Moment(exists=present, terms=last, shortfall=shortfall),
        _Moment(exists=beside, terms=second, shortfall=several),
    ]


def _first_layer(rank: _Rank, grads: _Gradients) -> dict[str, Array]:
    """Backward of the rank's first layer: all other layers' gradients are there.

    Of activations that layer's alone are left, and what weights of the chunk's others wait with;
    its own gradients and those of the embedding are still to be made when nothing is there to add
    them to.
    """
    load, costs = rank.load, rank.costs
    chunk = load.total(costs, "waiting_bytes") / rank.layouts.vpp
    layers = load.num_layers / rank.layouts.vpp
    behind = chunk * np.maximum(layers - 1.0, 0.0) / np.maximum(layers, 1.0)
    waiting = np.where(np.isin(rank.layouts.schedule, SPLIT), behind, 0.0)
    saved, working, params = np.zeros(1), np.zeros(1), np.zeros(1)
    for (count, live), piece in zip(rank.each_layer(), costs.layers, strict=True):
        peak = np.where(grads.fresh, live.backward_peak_fresh, live.backward_peak)
        own = Counts.of_layer(piece).with_gradient
        saved = np.where(count > 0, np.maximum(saved, live.saved), saved)
        working = np.where(count > 0, np.maximum(working, peak), working)
        params = np.where(count > 0, np.maximum(params, own), params)
    table = load.embedding * (costs.embedding.trainable_params - load.head * costs.tied_params)
    table = np.maximum(table, 0.0)
    per_param = rank.states.gradient / rank.copies.shard
    unmade = np.where(grads.fresh, (params + table) * per_param, 0.0)
    return {
        "activations": saved + waiting,
        "workspace": np.maximum(working - saved, 0.0),
        "gradients": np.maximum(grads.after - unmade, grads.before),
        "gathered_parameters": rank.copies.at_layer,
        "comm_buffers": rank.copies.scattered,
    }


def _largest(moments: Sequence[dict[str, Array]]) -> Peak:
    totals = np.stack([sum(moment.values(), np.zeros(1)) for moment in moments])
    index = np.argmax(totals, axis=0)
    terms = dict.fromkeys(MEMORY_TERMS, np.zeros(len(index)))
    for i in sorted(set(index.tolist())):
        here = index == i
        for name, value in moments[i].items():
            terms[name] = np.where(here, value, terms[name])
    return Peak(total=np.max(totals, axis=0), terms=terms)
