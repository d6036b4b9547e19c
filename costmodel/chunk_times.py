"""The predicted time of every chunk of a step, by name, for who holds a run to it.

A chunk is what a rank does without meeting others: the forward of a stage for one micro-batch
(`F3`), its backward (`B3`) or the halves of one (`I3`, `W3`), and what follows all of them once per
step (`U`: exchange over replicas, clipping, optimiser, fixed host time). What the simulator plays,
in the order of a plan, is these and the messages between ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..plan import Plan
from .ranks import IN_LAYER_AXES, Update
from .simulate import Simulation
from .stages import Load

Terms = dict[str, float]
"""Seconds by time term."""
UPDATE = "U"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTimes:
    """Seconds of one step's chunks, by pipeline rank and name, and of a message."""

    by_rank: tuple[dict[str, Terms], ...]
    hop_s: float
    """From the end of a chunk to the start of the one on another rank that waits for it."""
    step_s: float
    """What the simulator makes of them."""


def with_own_cores(plan: Plan) -> Plan:
    """The plan on devices that share nothing: no process waits for a core of another."""
    replace = msgspec.structs.replace
    pools = tuple(replace(pool, shared_cores=None) for pool in plan.cluster.pools)
    return replace(plan, cluster=replace(plan.cluster, pools=pools))


def chunk_times(plan: Plan) -> ChunkTimes:
    """The chunks of a plan's first phase, priced by its own cluster."""
    sim = Simulation(plan, plan.phase)
    drift = sim.prices.drift
    total = sim.durations()
    ranks: list[dict[str, Terms]] = []
    for rank, once in enumerate(sim.updates):
        chunks = {UPDATE: _scaled(_update_terms(sim, once), drift)}
        for stage, load in enumerate(sim.stage_loads):
            if sim.owners[stage] == rank:
                for kind in ("F", "B", "I", "W") if sim.split else ("F", "B"):
                    terms = _terms(sim, load, kind)
                    rest = total((kind, stage, 0)) - sum(terms.values())
                    chunks[f"{kind}{stage}"] = _scaled({**terms, "host": rest}, drift)
        ranks.append(chunks)
    return ChunkTimes(
        by_rank=tuple(ranks), hop_s=max(sim.hops_s()) * drift, step_s=sim.step_s(sim.played())
    )


def _terms(sim: Simulation, load: Load, kind: str) -> Terms:
    """One chunk's seconds by term; what is missing to its whole is the host's."""

    def of(*names: str) -> float:
        return sum(float(load.total(sim.costs, name)[0]) for name in names)

    if kind == "W":
        return {"backward": of("weight_s")}
    way = 0 if kind == "F" else 1
    exposed = {
        f"exposed.{axis}": float(load.communication(sim.costs, axis)[way][0])
        for axis in IN_LAYER_AXES
    }
    host_s = float(load.host_s(sim.costs)[way][0])
    if kind == "F":
        return {"forward": of("forward_s") + host_s, **exposed}
    later_s = of("weight_s") if kind == "I" else 0.0
    return {
        "backward": of("backward_s") + host_s - later_s,
        "recompute": of("recompute_s"),
        **exposed,
    }


def _update_terms(sim: Simulation, once: Update) -> Terms:
    """What a rank does once per step, by term; the norm's sum goes with the rest to the host."""
    terms = {
        "forward": float(once.dp.forward_s[0]),
        "backward": float(once.dp.backward_s[0]),
        "exposed.dp": float(once.dp.exposed_s[0]),
        "exposed.copy": float(once.states.exposed_s[0]),
        "optimizer": float(once.optimizer_s[0]),
    }
    return {**terms, "host": float(once.total_s[0]) - sum(terms.values())}


def _scaled(terms: Terms, factor: float) -> Terms:
    return {name: seconds * factor for name, seconds in terms.items() if seconds > 0}
