"""Memory of a plan in detail: every pipeline rank by category, and what layers keep by tensor."""

from __future__ import annotations

import numpy as np

from ..document import Value
from ..plan import Plan
from .kept import Kept
from .piece_graphs import kept_by_tensor
from .simulate import Simulation

OTHERWISE = "(kept otherwise)"
"""What a stack keeps beyond the tensors of the operator graph or, below zero, less than these, and
what lies on the host."""


class RankMemory(Value, frozen=True, kw_only=True):
    """One pipeline rank at its own peak."""

    rank: int
    peak_bytes: float
    terms_bytes: dict[str, float]


class KeptTensor(Value, frozen=True, kw_only=True):
    """A tensor that one micro-batch keeps from forward to backward."""

    piece: str
    """embedding, layer or head; layers that differ are numbered."""
    times: float
    """Pieces of the kind on the rank."""
    tensor: str
    bytes: float
    """Of one piece and micro-batch."""


class MemoryReport(Value, frozen=True, kw_only=True):
    """The memory of a plan's first phase."""

    ranks: tuple[RankMemory, ...]
    fullest: int
    kept: tuple[KeptTensor, ...]
    """On the fullest rank, the largest of each piece first."""


def memory_report(plan: Plan) -> MemoryReport:
    """The memory of every pipeline rank, and of the fullest one what micro-batches keep.

    Raises InputError when the plan contradicts itself or its model is not covered.
    """
    plan.check()
    sim = Simulation(plan, plan.phase)
    ranks: list[RankMemory] = []
    for rank in range(sim.mesh.pp):
        peak = sim.memory_of([rank])
        terms = {name: float(value[0]) for name, value in peak.terms.items()}
        ranks.append(RankMemory(rank=rank, peak_bytes=float(peak.total[0]), terms_bytes=terms))
    pools = [sim.pools[k] for k in sim.pool_of_rank]
    shares = [x.peak_bytes / p.device.memory_bytes for x, p in zip(ranks, pools, strict=True)]
    fullest = int(np.argmax(shares))
    return MemoryReport(ranks=tuple(ranks), fullest=fullest, kept=tuple(_kept(sim, fullest)))


def _kept(sim: Simulation, rank: int) -> list[KeptTensor]:
    load, model, pool = sim.rank_loads[rank], sim.grouped.model, sim.pool_of_rank[rank]
    prices = sim.prices_of[pool]
    kept = Kept.of(sim.costs_of[pool], sim.layouts, prices.pool.stack)
    several = len(model.layers) > 1
    first, last = model.layers[0], model.layers[-1]
    pieces = [("embedding", "embedding", first, sim.options, load.embedding, kept.embedding)]
    for index, layer in enumerate(model.layers):
        name = f"layer {index}" if several else "layer"
        own = (sim.grouped.options[index], load.layers[index], kept.layers[index])
        pieces.append(("layer", name, layer, *own))
    pieces.append(("head", "head", last, sim.options, load.head, kept.head))
    result: list[KeptTensor] = []
    for build, name, layer, options, times, live in pieces:
        if float(times[0]) == 0:
            continue
        tensors = kept_by_tensor(
            build, model, layer, sim.layouts, sim.phase.seq_tokens, prices, options
        )
        found = {tensor: float(size[0]) for tensor, size in tensors.items()}
        other = float(live.saved[0]) - sum(found.values())
        if abs(other) > 0.5:
            found[OTHERWISE] = other
        result += [
            KeptTensor(piece=name, times=float(times[0]), tensor=tensor, bytes=size)
            for tensor, size in found.items()
            if size
        ]
    return result
