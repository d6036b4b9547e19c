"""Replicas that train apart, as an axis of the search: which rows of the grid, and how often they
meet.

Where the workload allows it (`--allow published`, `--accept-risk diloco`), rows are added whose
replicas are whole nodes and meet by Streaming DiLoCo in fp32. Their bounds are those of the inner
steps, which meetings only add to. When such a row is simulated its period is chosen: with t_F
seconds of transfer of one of F fragments, of which b_F are not hidden anyway, and inner steps of
T seconds,

    d_F = ceil((t_F - b_F) / T)     the shortest delay that hides it
    H_F = F (d_F + 1)               the shortest period that leaves room for that delay

The smallest H_F is best for what is learned, but one fragment comes nearly a period late. Of the F
whose H_F is within `NEAR` of the smallest, the one with the shortest delay is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from ..cluster import Pool
from ..costmodel.layout import Layouts
from ..costmodel.options import Options
from ..costmodel.priced_pieces import Known
from ..costmodel.simulate import Simulation
from ..local_sgd import RECORDS, TECHNIQUE, LocalSgd
from ..model import Model
from ..plan import Plan
from ..workload import Workload
from .pins import Pins
from .quality import is_allowed

MOST_FRAGMENTS = 8
NEAR = 1.25
UNSETTLED = LocalSgd(period=1)
"""What stands in a row's options until its period is chosen: it needs as much memory."""


def may_be_apart(model: Model, pools: Sequence[Pool], workload: Workload, pins: Pins) -> bool:
    """Whether rows of replicas apart are looked at."""
    if pins.local_sgd is not None:
        return True
    whole = model.traced is None and all(layer.experts is None for layer in model.layers)
    several = len(pools) == 1 and pools[0].num_nodes > 1
    return whole and several and is_allowed(workload, RECORDS[UNSETTLED.outer])


def with_rows_apart(grid: Layouts, pools: Sequence[Pool], pins: Pins) -> Layouts:
    """The grid with rows whose replicas train apart: those alone where that is pinned."""
    fits = (grid.dp_replicate > 1) & (grid.pp == 1) & (grid.cp == 1) & (grid.ep == 1)
    if pins.local_sgd is None:  # a slow link is one between nodes
        fits &= (grid.world // grid.dp_replicate) % pools[0].devices_per_node == 0
    some = grid.take(np.flatnonzero(fits))
    apart = replace(some, dp_replicate=np.ones_like(some.tp), apart=some.dp_replicate)
    return apart if pins.local_sgd is not None else Layouts.joined([grid, apart])


def unsettled(options: Options, layout: Layouts) -> Options:
    """The options of one row, which say that its replicas train apart where they do."""
    if int(layout.apart[0]) == 1 or options.local_sgd is not None:
        return options
    return replace(options, local_sgd=UNSETTLED)


def settled(plan: Plan, pins: Pins, known: Known | None = None) -> Plan:
    """The plan with the period of its meetings chosen, where the pins leave it open."""
    local = plan.phase.local_sgd
    if local is None or pins.local_sgd is not None:
        return plan
    sim = Simulation(plan, plan.phase, known)
    inner_s = sim.inner_step_s(sim.played())
    found: list[LocalSgd] = []
    for fragments in range(1, min(MOST_FRAGMENTS, plan.model.num_layers) + 1):
        way = LocalSgd(period=fragments, fragments=fragments)
        longest = max(m.seconds - m.busy_s for m in sim.meetings_by(way).messages)
        delay = max(0, math.ceil(longest / inner_s))
        found.append(
            LocalSgd(period=fragments * (delay + 1), fragments=fragments, delay=delay or None)
        )
    shortest = min(way.period for way in found)
    near = [way for way in found if way.period <= NEAR * shortest]
    best = min(near, key=lambda way: (way.steps_late, way.period, way.fragments))
    settings = tuple(
        msgspec.structs.replace(s, techniques=s.techniques | {TECHNIQUE: best.settings()})
        for s in plan.phase.settings
    )
    phase = msgspec.structs.replace(plan.phase, settings=settings)
    return msgspec.structs.replace(plan, phases=(phase,))
