"""Steps over sequences of unequal length: what passes of unequal groups cost, and the whole step.

A pass is some sequences, one packed after another, on an aligned block of the data-parallel ranks:
context parallelism of d ranks for its duration. All passes are priced at once, each as a layout of
its own length with cp = d and N/d replicas, by the formulas of every other layout.

    rank r takes its passes in their order; a pass starts when all ranks of its block are there
    ranks meet after each micro-batch under ZeRO 2 and 3, which communicate in every pass, else at
        the end: step = play of the passes + gradient exchange and update
    bytes: of each pass on its ranks, and of the exchange with as many passes per rank as there are

A rank with nothing to do in a micro-batch under ZeRO 2 or 3, or in a whole step, takes a pass of two
tokens without weight, so that all ranks take part in every collective. A row of a block is padded to
equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from ..estimate import MEMORY_TERMS, TIME_TERMS, Estimate
from ..plan import Phase, Plan
from .graph import Array
from .groups import Grouped
from .layout import Layouts
from .memory import InFlight
from .options import Options
from .packing import Rows
from .pieces import Pieces, pieces
from .prices import Prices
from .ranks import IN_LAYER_AXES, Update, rank_memory, stage_times, update
from .simulate import evidence_of, fit_probability, interval, step_spread
from .stages import Load

EMPTY_TOKENS = 2
"""Of a pass without sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPass:
    """Sequences on ranks start .. start + degree - 1."""

    start: int
    degree: int
    kind: str
    """none, ring (balanced) or ulysses."""
    sequences: tuple[int, ...]
    """Their places in the step's batch."""
    lengths: tuple[int, ...]
    meeting: int = 0
    """The micro-batch, where ranks meet after each."""

    @property
    def tokens(self) -> int:
        """Of the whole row, padded to what the block divides."""
        parts = {"none": 1, "ulysses": self.degree}.get(self.kind, 2 * self.degree)
        return -(-max(sum(self.lengths), EMPTY_TOKENS) // parts) * parts

    @property
    def ends(self) -> tuple[int, ...]:
        """Ends of the documents of the row; the padding is one of its own."""
        ends = tuple(accumulate(self.lengths))
        return ends if ends and ends[-1] == self.tokens else (*ends, self.tokens)

    @property
    def ranks(self) -> range:
        """The ranks of the block."""
        return range(self.start, self.start + self.degree)


Step = tuple[GroupPass, ...]
"""The passes of a step in the one order that all ranks share."""


def meets_each(phase: Phase) -> bool:
    """Whether all ranks meet in every micro-batch."""
    return phase.zero >= 2


def with_empty(passes: Sequence[GroupPass], num_ranks: int, *, meets: bool) -> Step:
    """The passes, and those without sequences of ranks that have none where they need one."""
    complete: list[GroupPass] = []
    meetings = sorted({p.meeting for p in passes}) if meets else [None]
    for meeting in meetings:
        own = [p for p in passes if meeting is None or p.meeting == meeting]
        busy = {rank for p in own for rank in p.ranks}
        complete += own
        for rank in range(num_ranks):
            if rank not in busy:
                complete.append(
                    GroupPass(start=rank, degree=1, kind="none", sequences=(), lengths=(),
                              meeting=own[-1].meeting)
                )  # fmt: skip
    return tuple(complete)


class Priced:
    """What passes cost under a plan; arrays have one entry per pass."""

    def __init__(self, plan: Plan, passes: Step) -> None:
        phase = plan.phase
        self.plan, self.phase, self.passes = plan, phase, passes
        self.num_ranks = phase.mesh.world
        self.pool = plan.cluster.pool(phase.stages[0].pool)
        self.prices = Prices(
            self.pool, plan.cluster.profile, min(self.num_ranks, self.pool.devices_per_node)
        )
        grouped = Grouped.of(plan.model, phase, plan.workload)
        rows = Rows(tuple((p.ends, p.degree if p.kind == "ring" else 1) for p in passes))
        self.options = replace(Options.of(phase, plan.workload), packing=rows)
        each = [replace(own, packing=rows) for own in grouped.options]
        self.layouts = _layouts(phase, passes, per_rank(passes, self.num_ranks))
        self.tokens = np.array([float(p.tokens) for p in passes])
        self.costs: Pieces = pieces(
            grouped.model, self.layouts, self.tokens, self.prices, self.options, each
        )
        (self.load,) = grouped.loads(phase.stages)
        times = stage_times(self.load, self.costs, self.prices)
        self.seconds: Array = (times.forward_s + times.backward_s) * self.prices.drift
        """Of each pass."""

    def total(self, name: str) -> Array:
        """One cost of each pass."""
        return self.load.total(self.costs, name) + np.zeros(len(self.passes))

    def communication(self) -> dict[str, Array]:
        """Exposed seconds of each pass by mesh axis."""
        zero = np.zeros(len(self.passes))
        return {
            axis: zero + sum(self.load.communication(self.costs, axis), np.zeros(1))
            for axis in IN_LAYER_AXES
        }

    def wire_bytes(self) -> dict[str, Array]:
        """Bytes that each rank of a pass hands to collectives, by `collective@axis`."""
        total: dict[str, Array] = {}
        for count, piece in self.load.each(self.costs):
            for name, value in piece.wire_bytes.items():
                before = total.get(name, np.zeros(len(self.passes)))
                total[name] = before + count * value
        return total

    def memory(self) -> dict[str, float]:
        """Terms of the pass with the highest peak."""
        one = np.ones(len(self.passes))
        several = self.layouts.num_microbatches > 1
        flight = InFlight(first=one, later=np.where(several, one, 0.0))
        peak = rank_memory(
            self.load, self.costs, self.layouts, self.prices, self.options, flight
        )
        at = int(np.argmax(peak.total))
        terms = {name: np.broadcast_to(v, peak.total.shape)[at] for name, v in peak.terms.items()}
        return {name: float(value) for name, value in terms.items()}


def per_rank(passes: Sequence[GroupPass], num_ranks: int) -> list[int]:
    """Passes of each rank."""
    counts = [0] * num_ranks
    for p in passes:
        for rank in p.ranks:
            counts[rank] += 1
    return counts


def _layouts(phase: Phase, passes: Step, counts: Sequence[int]) -> Layouts:
    """A layout per pass: its block shares the sequence, as many others work beside it."""
    cp = np.array([p.degree for p in passes], dtype=np.int64)
    inside = [p.degree if p.kind == "ulysses" else 1 for p in passes]
    one, replicas = np.ones_like(cp), phase.mesh.world // cp
    return Layouts(
        micro_batch_seqs=one,
        num_microbatches=np.array([max(counts[r] for r in p.ranks) for p in passes]),
        dp_replicate=one if phase.zero else replicas,
        dp_shard=replicas if phase.zero else one,
        tp=one,
        pp=one,
        vpp=one,
        zero=one * phase.zero,
        sequence_parallel=one * 0,
        schedule=one,
        cp=cp,
        ulysses=np.array(inside, dtype=np.int64),
        ep=one,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One step."""

    seconds: float
    time_terms_s: dict[str, float]
    memory_terms_bytes: dict[str, float]
    bytes_on_wire: dict[str, float]
    tokens: int
    flops: float


def step_cost(plan: Plan, passes: Step) -> StepCost:
    """What a step of these passes costs, `with_empty` ones included."""
    priced = Priced(plan, passes)
    num_ranks = priced.num_ranks
    shares_of = np.array([p.degree / num_ranks for p in passes])
    once = _once(priced)
    makespan = played_s(passes, priced.seconds.tolist(), num_ranks, meets=meets_each(plan.phase))
    seconds = makespan + float(once.total_s[0]) * priced.prices.drift
    terms = _terms(priced, once, shares_of, makespan)
    wire = {name: float(value @ shares_of) for name, value in priced.wire_bytes().items()}
    for name, value in once.dp.wire_bytes.items():
        wire[name] = wire.get(name, 0.0) + float(np.asarray(value).reshape(-1)[0])
    lengths = [length for p in passes for length in p.lengths]
    flops = sum(length * plan.model.flops_per_token(length) for length in lengths)
    return StepCost(
        seconds=seconds,
        time_terms_s={name: value * seconds / sum(terms.values()) for name, value in terms.items()},
        memory_terms_bytes=dict.fromkeys(MEMORY_TERMS, 0.0) | priced.memory(),
        bytes_on_wire={name: value for name, value in sorted(wire.items()) if value > 0},
        tokens=sum(lengths),
        flops=flops,
    )


def played_s(
    passes: Sequence[GroupPass], seconds: Sequence[float], num_ranks: int, *, meets: bool
) -> float:
    """When the last rank is done: a pass starts once its ranks are done with those before it.

    >>> one, both = (GroupPass(start=0, degree=d, kind="none", sequences=(), lengths=()) for d in (1, 2))
    >>> played_s([one, both], [3.0, 2.0], 2, meets=False)
    5.0
    """
    done = [0.0] * num_ranks
    for at, (p, own) in enumerate(zip(passes, seconds, strict=True)):
        if meets and at and p.meeting != passes[at - 1].meeting:
            done = [max(done)] * num_ranks
        end = max(done[rank] for rank in p.ranks) + own
        for rank in p.ranks:
            done[rank] = end
    return max(done)


def _once(priced: Priced) -> Update:
    """Exchange and update of a rank, beside passes of the mean length."""
    phase, passes = priced.phase, priced.passes
    counts = per_rank(passes, priced.num_ranks)
    mean = sum(p.tokens for p in passes) / sum(p.degree for p in passes)
    alone = GroupPass(start=0, degree=1, kind="none", sequences=(), lengths=(max(1, round(mean)),))
    layouts = _layouts(phase, (alone,), [max(counts)])
    grouped = Grouped.of(priced.plan.model, phase, priced.plan.workload)
    each = [replace(own, packing=None) for own in grouped.options]
    options = replace(priced.options, packing=None)
    costs = pieces(grouped.model, layouts, alone.tokens, priced.prices, options, each)
    return update(priced.load, costs, layouts, priced.prices, options)


def _terms(priced: Priced, once: Update, shares_of: Array, makespan: float) -> dict[str, float]:
    """Mean over ranks; waiting for others counts as exposed exchange."""

    def mean(name: str) -> float:
        return float(priced.total(name) @ shares_of)

    terms = dict.fromkeys(TIME_TERMS, 0.0)
    terms["forward"] = mean("forward_s") + mean("host_forward_s") + float(once.dp.forward_s[0])
    terms["backward"] = mean("backward_s") + mean("host_backward_s") + float(once.dp.backward_s[0])
    terms["recompute"] = mean("recompute_s")
    for axis, seconds in priced.communication().items():
        terms[f"exposed.{axis}"] = float(seconds @ shares_of)
    idle = (makespan - float(priced.seconds @ shares_of)) / priced.prices.drift
    terms["exposed.dp"] = float(once.dp.exposed_s[0]) + max(0.0, idle)
    terms["optimizer"] = float(once.optimizer_s[0])
    terms["host"] = float(once.host_s[0] + once.dp.host_s[0])
    return terms


def estimate_steps(plan: Plan, steps: Sequence[Step]) -> Estimate:
    """The mean of some steps of a plan, and the highest of their peaks."""
    priced = [step_cost(plan, step) for step in steps]
    count = len(priced)
    seconds = sum(one.seconds for one in priced) / count
    terms = _mean([one.time_terms_s for one in priced])
    fullest = max(priced, key=lambda one: sum(one.memory_terms_bytes.values())).memory_terms_bytes
    total = sum(fullest.values())
    pool = plan.cluster.pool(plan.phase.stages[0].pool)
    prices = Prices(pool, plan.cluster.profile)
    options = Options.of(plan.phase, plan.workload)
    per_device = sum(one.flops for one in priced) / count / seconds / plan.phase.mesh.world
    peaks = pool.device.peak_flops_per_s
    probability = fit_probability(total, pool)
    return Estimate(
        step_s=interval(seconds, step_spread(prices, terms, seconds)),
        tokens_per_s=sum(one.tokens for one in priced) / count / seconds,
        model_flops_per_s_per_device=per_device,
        mfu=per_device / (peaks.get(options.compute) or max(peaks.values())),
        peak_memory_bytes=interval(total, pool.stack.memory_spread),
        fits="yes" if probability >= 0.95 else "no" if probability < 0.05 else "marginal",
        fit_probability=probability,
        capacity_bytes=pool.device.memory_bytes,
        time_terms_s=terms,
        memory_terms_bytes=fullest,
        bytes_on_wire=_mean([one.bytes_on_wire for one in priced]),
        evidence=evidence_of(prices, terms),
    )


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}
