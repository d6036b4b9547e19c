"""Answers in words: what binds, where time and memory go, how sure it is, why runners-up lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..document import Value
from ..estimate import Estimate
from ..units import GIB, format_seconds

if TYPE_CHECKING:
    from .search import SearchResult


class RuledOut(Value, frozen=True, kw_only=True):
    """A layout without enough memory; time and memory are at least these."""

    label: str
    step_s: float
    memory_bytes: float


def why(result: SearchResult) -> list[str]:
    """Lines for a terminal: what binds, where time and memory go, how sure it is, the runner-up."""
    if result.infeasible is not None:
        lines = [f"Nothing fits: {result.infeasible.reason}"]
        return lines + [f"It would fit with: {change}" for change in result.infeasible.changes]
    best = result.plans[0]
    lines = [
        _binding(best.estimate, result.ruled_out),
        f"Time: {_shares(best.estimate.time_terms_s)}",
        f"Memory: {_shares(best.estimate.memory_terms_bytes)}",
        _certainty(result),
    ]
    if best.estimate.fits == "marginal":
        lines.insert(1, _marginal(result))
    if len(result.plans) > 1:
        second = result.plans[1]
        lines.append(f"Runner-up {second.label}: {second.lost}")
    return lines


def _binding(estimate: Estimate, ruled_out: RuledOut | None) -> str:
    used, capacity = estimate.peak_memory_bytes.median, estimate.capacity_bytes
    filled = f"{in_gib(used)} of {in_gib(capacity)} per device"
    if ruled_out is None:
        return f"Time binds: no layout that memory ruled out could be faster ({filled})."
    faster = 1 - ruled_out.step_s / estimate.step_s.median
    return (
        f"Memory binds: {ruled_out.label} might be up to {faster:.1%} faster but needs"
        f" {in_gib(ruled_out.memory_bytes)} ({filled})."
    )


def _marginal(result: SearchResult) -> str:
    probability = result.plans[0].estimate.fit_probability
    chance = f"May run out of memory: fits with probability {probability:.0%}"
    safe = next((r for r in result.plans if r.estimate.fits == "yes"), None)
    return f"{chance}; {safe.label} surely fits ({safe.lost})." if safe else f"{chance}."


def _shares(terms: dict[str, float]) -> str:
    total = sum(terms.values())
    shown = sorted((-value, name) for name, value in terms.items() if value >= 0.005 * total > 0)
    return ", ".join(f"{name} {-value / total:.0%}" for value, name in shown)


def _certainty(result: SearchResult) -> str:
    stats = result.stats
    effort = f"{stats.simulated} of {stats.bounded} legal layouts simulated"
    if stats.proven:
        return f"Proven: no other legal layout is better in this cost model ({effort})."
    stopped = {"time": "the time limit struck", "tolerance": "near enough"}[stats.limit or "time"]
    return f"Gap {stats.gap or 0.0:.2%}: {stopped} ({effort})."


def why_lost(estimate: Estimate, best: Estimate, objective: str) -> str:
    """How much worse than the best, and the terms that grew: `+12.0 % step: bubble +80.0 ms`."""
    if objective == "memory":
        what, ours, theirs = "memory", estimate.memory_terms_bytes, best.memory_terms_bytes
        worse = estimate.peak_memory_bytes.median / best.peak_memory_bytes.median - 1
    else:
        what, ours, theirs = "step", estimate.time_terms_s, best.time_terms_s
        worse = estimate.step_s.median / best.step_s.median - 1
    growth = {name: ours.get(name, 0.0) - theirs.get(name, 0.0) for name in {*ours, *theirs}}
    grown = sorted((-value, name) for name, value in growth.items() if value > 0)
    threshold = 0.1 * sum(-value for value, _ in grown)
    show = in_gib if objective == "memory" else format_seconds
    terms = ", ".join(f"{name} +{show(-value)}" for value, name in grown[:3] if -value >= threshold)
    if worse < 0:
        return f"{worse * 100:+.1f} % {what}, too little for techniques that are not exact"
    return f"{worse * 100:+.1f} % {what}" + (f": {terms}" if terms else "")


def in_gib(num_bytes: float) -> str:
    """Memory in GiB as text."""
    return f"{num_bytes / GIB:.2f} GiB"
