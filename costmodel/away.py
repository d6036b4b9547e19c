"""What offload adds to a simulated phase: copies waited for, bytes moved, bytes off the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .copies import returns_at_once
from .exposed import copies_s
from .graph import Array
from .in_flight import live_moments, moments_of
from .pieces import Piece
from .prices import Prices
from .schedule import live_chunks

if TYPE_CHECKING:
    from .simulate import Simulation


def first_fetch_s(sim: Simulation, stage: int) -> float:
    """The copy that the backward of a stage's last layer waits for, beyond what it is charged
    anyway: nothing runs beside it, unless the layer's bytes are on the device still."""
    last, pool = sim.phase.stages[stage].layers[1], sim.pool_of_stage[stage]
    piece = sim.costs_of[pool].layers[int(sim.grouped.group_of[last])]
    if not piece.moved_bytes[0]:
        return 0.0
    at_end = stage == sim.mesh.num_stages - 1
    if at_end and returns_at_once(sim.phase) == sim.phase.num_microbatches:
        return 0.0
    return float(fetch_s(piece, sim.prices_of[pool])[0])


def fetch_s(piece: Piece, prices: Prices) -> Array:
    """`first_fetch_s` where this piece is the last layer of a stage and its bytes are away."""
    whole = copies_s(piece.moved_bytes, "in", piece.options, prices)
    charged = piece.comm_backward_s.get("copy", np.zeros(1))
    return np.maximum(0.0, whole * prices.scale("exposed.copy") - charged)


def bytes_copied(sim: Simulation) -> dict[str, float]:
    """Bytes that offload moves each way, per rank and step, mean over ranks."""
    p, m = sim.mesh.pp, sim.phase.num_microbatches
    out = m * sum(_moved_bytes(sim, rank) for rank in range(p)) / p
    stayed = 0.0
    if out:
        stayed = returns_at_once(sim.phase) * float(sim.last_layer.moved_bytes[0]) / p
    states_out = sum(float(once.states.out_bytes[0]) for once in sim.updates) / p
    states_in = sum(float(once.states.in_bytes[0]) for once in sim.updates) / p
    tier = sim.options.offload_tier
    moved = {f"out@{tier}": out + states_out, f"in@{tier}": out - stayed + states_in}
    return {name: value for name, value in moved.items() if value > 0}


def bytes_off_device(sim: Simulation) -> dict[str, float]:
    """By tier, the most that the fullest rank holds there: offloaded activations of all
    micro-batches in flight, and states."""
    most = max(_off_device_bytes(sim, rank) for rank in range(sim.mesh.pp))
    return {sim.options.offload_tier: most} if most else {}


def exceeds_hosts(sim: Simulation) -> bool:
    """Whether the host of a node has too little memory for what its ranks hold there."""
    if sim.options.offload_tier != "host":
        return False
    for rank in range(sim.mesh.pp):
        pool = sim.pools[sim.pool_of_rank[rank]]
        ranks = min(sim.mesh.world, pool.devices_per_node)
        if _off_device_bytes(sim, rank) * ranks > (pool.host_memory_bytes or math.inf):
            return True
    return False


def _moved_bytes(sim: Simulation, rank: int) -> float:
    """Off the device per micro-batch, through all chunks of a rank."""
    costs = sim.costs_of[sim.pool_of_rank[rank]]
    return float(sim.rank_loads[rank].total(costs, "moved_bytes")[0])


def _off_device_bytes(sim: Simulation, rank: int) -> float:
    """The most that a rank holds off the device."""
    states = float(sim.updates[rank].states.num_bytes[0])
    moved = _moved_bytes(sim, rank)
    if not moved:
        return states
    return _chunks_in_flight(sim, rank) / sim.mesh.vpp * moved + states


def _chunks_in_flight(sim: Simulation, rank: int) -> int:
    """The most chunks of a rank between their forward and their backward."""
    schedule, mesh, m = sim.phase.schedule, sim.mesh, sim.phase.num_microbatches
    if sim.own_orders is not None:
        first, moments = moments_of(sim.own_orders[rank])
    elif sim.split:
        first, moments = live_moments(schedule, mesh.pp, mesh.vpp, m, rank)
    else:
        return int(max(live_chunks(schedule, mesh.pp, mesh.vpp, m, rank)))
    return max(first, *(before for before, _ in moments), 0)
