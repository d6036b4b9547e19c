"""The Estimate of a plan: its step, terms, memory and traffic, and how certain each is."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..cluster import Pool
from ..estimate import Estimate, Evidence, Interval
from ..plan import Plan
from . import admissible
from .away import bytes_copied, bytes_off_device, exceeds_hosts
from .priced_pieces import Known
from .prices import Prices
from .simulate import Simulation

Z90 = 1.645
UNCERTAIN = 2.0
"""Spread of terms of links and host relative to that of device work: assumed."""
RUN_TO_RUN = 0.02
"""Of repeated runs of one plan: releases and repeats in the published tables differ by 2 to 5 %."""
LINK_SPREAD = 0.25
"""Of measured collectives between processes, whose tails are heavy: assumed."""


def estimate(plan: Plan, known: Known | None = None) -> Estimate:
    """The predicted cost of one optimiser step of a plan's first phase.

    With `known` what plans have in common is priced once. Raises InputError when the plan
    contradicts itself, its devices lack what a technique needs, or its model is not covered.
    """
    plan.check()
    admissible.check(plan)
    sim = Simulation(plan, plan.phase, known)
    played = sim.played()
    step, terms = sim.step_s(played), sim.time_terms(played)
    peak, fullest = sim.memory()
    memory_terms = {name: float(value[0]) for name, value in peak.terms.items()}
    total = float(sum(memory_terms.values()))
    capacity = fullest.device.memory_bytes
    memory_spread = Prices(fullest, plan.cluster.profile).memory_spread
    probability = _normal_cdf((capacity - total) / (memory_spread * total))
    if exceeds_hosts(sim):
        probability = 0.0
    tokens = plan.phase.seq_tokens * plan.workload.global_batch_seqs
    packing = sim.options.packing
    attended = None if packing is None else packing.attended_tokens
    flops = tokens * plan.model.flops_per_token(plan.phase.seq_tokens, attended)
    per_device = flops / step / sim.mesh.world
    peak_flops = sum(
        share.num_devices * _peak_flops(share, sim.options.compute) for share in sim.pools
    ) / sum(share.num_devices for share in sim.pools)
    spread = _step_spread(sim, terms, step)
    return Estimate(
        step_s=_interval(step, spread),
        tokens_per_s=tokens / step,
        model_flops_per_s_per_device=per_device,
        mfu=per_device / peak_flops,
        peak_memory_bytes=_interval(total, memory_spread),
        fits="yes" if probability >= 0.95 else "no" if probability < 0.05 else "marginal",
        fit_probability=probability,
        capacity_bytes=capacity,
        time_terms_s=terms,
        memory_terms_bytes=memory_terms,
        bytes_on_wire=sim.wire_bytes(),
        bytes_copied=bytes_copied(sim),
        bytes_off_device=bytes_off_device(sim),
        evidence=_evidence(sim, terms),
    )


def _peak_flops(pool: Pool, compute: str) -> float:
    peaks = pool.device.peak_flops_per_s
    return peaks.get(compute) or max(peaks.values())


def _interval(median: float, spread: float) -> Interval:
    factor = math.exp(Z90 * spread)
    return Interval(median=median, low=median / factor, high=median * factor)


def _normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def _step_spread(sim: Simulation, terms: dict[str, float], step: float) -> float:
    """Relative standard deviation of the step: one per class of term, added in squares.

    The stack's (or profile's) spread is that of device work; links and the host's launches are less
    certain by `UNCERTAIN`, and runs of one plan differ by `RUN_TO_RUN`.
    """
    compute_spread = max(
        prices.pool.stack.spread if prices.profile is None else prices.profile.spread
        for prices in sim.prices_of
    )
    measured_links = all(prices.link_evidence == "measured" for prices in sim.prices_of)
    widest = max(pool.stack.spread for pool in sim.pools)
    link_spread = LINK_SPREAD if measured_links else UNCERTAIN * widest
    links = sum(value for name, value in terms.items() if name.startswith("exposed."))
    host = terms["host"]
    classes = (
        (step - links - host) * compute_spread,
        links * link_spread,
        host * UNCERTAIN * compute_spread,
    )
    return math.sqrt(sum((part / step) ** 2 for part in classes) + RUN_TO_RUN**2)


WEAKEST_FIRST: tuple[Evidence, ...] = ("assumed", "catalog", "measured")


def _weakest(found: Iterable[Evidence]) -> Evidence:
    return min(found, key=WEAKEST_FIRST.index)


def _evidence(sim: Simulation, terms: dict[str, float]) -> dict[str, Evidence]:
    """What every term rests on; of several pools the weakest."""
    links = _weakest(p.link_evidence for p in sim.prices_of)
    compute = _weakest(p.evidence for p in sim.prices_of)
    result: dict[str, Evidence] = {
        name: links if name.startswith("exposed.") else compute for name in terms
    }
    measured = all(prices.profile is not None for prices in sim.prices_of)
    result["memory"] = "measured" if measured else "assumed"
    return result
