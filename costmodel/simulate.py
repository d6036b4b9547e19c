"""A plan played through: step time, its terms, memory, traffic - the Estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ..cluster import Pool
from ..errors import InputError
from ..estimate import TIME_TERMS, Estimate, Evidence, Interval
from ..model import Model
from ..orders import Action
from ..plan import SPLIT_SCHEDULES, Phase, Plan, rank_of
from .graph import Array
from .groups import Grouped
from .in_flight import in_flight
from .layout import Layouts
from .memory import Peak
from .options import Options
from .pieces import Known, Pieces, pieces
from .prices import Prices
from .ranks import (
    IN_LAYER_AXES,
    StageTimes,
    Update,
    hop_s,
    rank_memory,
    sent_bytes,
    stage_times,
    update,
)
from .schedule import Played, orders, play, play_long, play_shared
from .stages import Load, for_each, merge, stacked
from .techniques import expert_offload

Z90 = 1.645
UNCERTAIN = 2.0
"""Spread of terms of links and host relative to that of device work: assumed."""
RUN_TO_RUN = 0.02
"""Of repeated runs of one plan: releases and repeats in the published tables differ by 2 to 5 %."""
LINK_SPREAD = 0.25
"""Of measured collectives between processes, whose tails are heavy: assumed."""


def check_covered(model: Model) -> None:
    """Raise InputError for models whose cost is not modelled yet."""
    for layer in model.layers:
        if layer.bias and (layer.experts is not None or layer.latent is not None):
            what = "experts" if layer.experts is not None else "latent attention"
            raise InputError("layers.bias", True, f"biases of {what} are not modelled yet "
                             f"({model.name})", "set bias = false; qkv_bias may stay")  # fmt: skip


class Simulation:
    """One phase of a plan with all its intermediate costs; arrays have length one."""

    def __init__(self, plan: Plan, phase: Phase, known: Known | None = None) -> None:
        check_covered(plan.model)
        self._known = known
        self.plan, self.phase, self.mesh = plan, phase, phase.mesh
        self.pool: Pool = plan.cluster.pool(phase.stages[0].pool)
        self.layouts = Layouts.of(phase)
        self.options = Options.of(phase, plan.workload)
        self.grouped = Grouped.of(plan.model, phase, plan.workload)
        mesh = self.mesh
        self.replicas = mesh.dp * mesh.cp * mesh.tp
        """Ranks that do the same work as one pipeline rank."""
        self.node_ranks = min(mesh.world, self.pool.devices_per_node)
        self.prices = Prices(self.pool, plan.cluster.profile, self.node_ranks)
        self.costs = self._pieces(self.prices)
        self.stage_loads = self.grouped.loads(phase.stages)
        self.own_orders = phase.own_orders()
        self.owners = [rank_of(phase.schedule, i, mesh.pp) for i in range(mesh.num_stages)]
        """The rank of each stage."""
        self.rank_loads = [
            merge(
                [load for load, own in zip(self.stage_loads, self.owners, strict=True) if own == r]
            )
            for r in range(mesh.pp)
        ]
        self.updates: list[Update] = for_each(
            self.rank_loads,
            lambda load: update(load, self.costs, self.layouts, self.prices, self.options),
        )

    def _pieces(self, prices: Prices) -> Pieces:
        return pieces(
            self.grouped.model,
            self.layouts,
            self.phase.seq_tokens,
            prices,
            self.options,
            self.grouped.options,
            self._known,
        )

    def _times(self, prices: Prices, costs: Pieces) -> list[StageTimes]:
        return for_each(self.stage_loads, lambda load: stage_times(load, costs, prices))

    @property
    def split(self) -> bool:
        """Whether the backward pass is split, so that gradients of weights may wait."""
        return self.phase.schedule in SPLIT_SCHEDULES

    @property
    def shares_cores(self) -> bool:
        """Whether pipeline ranks slow one another down by sharing a node's cores."""
        return self.pool.shared_cores is not None and self.mesh.pp > 1

    def played(self) -> Played:
        """The schedule played with this phase's stage times."""
        prices = self.prices
        hop = self.hop_s()
        action_s = prices.host("pp_action") if self.mesh.pp > 1 else 0.0
        shape = (self.phase.schedule, self.mesh.pp, self.mesh.vpp, self.phase.num_microbatches)
        if not self.shares_cores:
            durations = self.durations()
            overlaps = self.pool.stack.can_overlap
            if self.own_orders is not None:
                played = play(self.own_orders, durations, 0.0 if overlaps else hop)
            else:
                played = play_long(*shape, durations, 0.0 if overlaps else hop)
            fill_s = self.fill_hops_s() if overlaps else 0.0
            return replace(played, makespan_s=played.makespan_s + fill_s)
        alone = Prices(self.pool, self.plan.cluster.profile, self.replicas)
        costs = self._pieces(alone)
        base = self._times(alone, costs)
        speeds = self.speeds(base)
        order = self.own_orders or orders(*shape)
        return play_shared(order, self._durations(base, costs, action_s), hop, speeds)

    def durations(self) -> Callable[[Action], float]:
        """Seconds of each action on a rank with cores of its own."""
        action_s = self.prices.host("pp_action") if self.mesh.pp > 1 else 0.0
        return self._durations(self._times(self.prices, self.costs), self.costs, action_s)

    def _durations(
        self, times: list[StageTimes], costs: Pieces, action_s: float
    ) -> Callable[[Action], float]:
        """Seconds of each action, with what neighbours lose when they meet after it.

        Splitting a backward takes no time beyond the host's for a further action: gradients of
        inputs and of weights come from kernels of their own either way.
        """

        def whole(compute_s: Array) -> float:
            if self.mesh.pp == 1:
                return float(compute_s[0])
            replicas = np.array([float(self.replicas)])
            lost = self.prices.wait(compute_s, np.array([2.0]), replicas)
            return float(compute_s[0] + lost[0]) + action_s

        seconds = {
            "F": [whole(t.forward_s) for t in times],
            "B": [whole(t.backward_s) for t in times],
        }
        if self.split:
            weights = for_each(self.stage_loads, lambda load: load.total(costs, "weight_s"))
            pairs = zip(times, weights, strict=True)
            seconds["I"] = [whole(t.backward_s - weight) for t, weight in pairs]
            seconds["W"] = [float(weight[0]) + action_s for weight in weights]

        def duration(action: Action) -> float:
            return seconds[action[0]][action[1]]

        return duration

    def speeds(self, base: list[StageTimes]) -> list[float]:
        """Speed of a pipeline rank when 1, 2, ... pp of them are busy; the first is 1."""
        total = _sum(base)
        result = [1.0]
        for busy_ranks in range(2, self.mesh.pp + 1):
            prices = Prices(self.pool, self.plan.cluster.profile, busy_ranks * self.replicas)
            result.append(total / _sum(self._times(prices, self._pieces(prices))))
        return result

    def hop_s(self) -> float:
        """Transfer of one micro-batch's activations between neighbouring pipeline ranks."""
        return float(hop_s(self.costs, self.layouts, self.prices)[0])

    def fill_hops_s(self) -> float:
        """Transfers of fill and drain; where transfers run beside compute the others are hidden."""
        return 2 * (self.mesh.pp - 1) * self.hop_s()

    def memory(self) -> Peak:
        """Peak memory of the fullest rank."""
        ranks = list(range(self.mesh.pp))
        if len(self.phase.settings) <= 1 and not self.split and self.own_orders is None:
            # those between hold less of the same than the second
            ranks = sorted({0, min(1, self.mesh.pp - 1), self.mesh.pp - 1})
        load = stacked([self.rank_loads[rank] for rank in ranks])
        layouts = self.layouts.take(np.zeros(len(ranks), dtype=np.intp))
        shape = (self.mesh.pp, self.mesh.vpp, self.phase.num_microbatches)
        flight = in_flight(
            self.phase.schedule, shape, np.array(ranks), load, self.costs, layouts, self.pool.stack,
            self.own_orders,
        )  # fmt: skip
        peak = rank_memory(load, self.costs, layouts, self.prices, self.options, flight)
        fullest = int(np.argmax(peak.total))
        terms = {name: value[fullest : fullest + 1] for name, value in peak.terms.items()}
        return Peak(total=peak.total[fullest : fullest + 1], terms=terms)

    def wire_bytes(self) -> dict[str, float]:
        """Bytes handed to each collective, per rank and step, mean over ranks."""
        m = self.phase.num_microbatches
        total: dict[str, float] = {}

        def add(name: str, value: Array | float) -> None:
            number = float(np.asarray(value).reshape(-1)[0])
            if number > 0:
                total[name] = total.get(name, 0.0) + number / self.mesh.pp

        for load, step in zip(self.rank_loads, self.updates, strict=True):
            for count, piece in load.each(self.costs):
                for name, value in piece.wire_bytes.items():
                    add(name, count * value * m)
            for name, value in step.dp.wire_bytes.items():
                add(name, value)
            add("all_reduce@tp", load.total(self.costs, "uncut_gradient_bytes") / step.dp.shard)
        if self.options.clips and self.mesh.world > 1:
            add(f"all_reduce@{self.mesh.wire_name()}", 4.0 * self.mesh.pp)
        if self.mesh.pp > 1:
            boundary = self.costs.layers[0].boundary_bytes
            crossings = 2 * sum(a != b for a, b in pairwise(self.owners))
            add("send@pp", sent_bytes(boundary, self.layouts, self.prices) * m * crossings)
            if self.plan.model.tied_embeddings and self.owners[-1] != self.owners[0]:
                table = self.plan.model.vocab * self.plan.model.hidden / self.mesh.tp
                add("all_reduce@pp", 2 * 4.0 * table / self.updates[0].dp.shard)
        return dict(sorted(total.items()))

    def time_terms(self, played: Played) -> dict[str, float]:
        """Terms of the step, mean over ranks; `bubble` is what remains of each rank's step.

        Host time inside a forward or backward is part of it, as in the measurement; `host` is the
        rest: per step, micro-batch, exchange and pipeline action.
        """
        p = self.mesh.pp
        terms = dict.fromkeys(TIME_TERMS, 0.0)
        step = self.step_s(played)
        shared = self._busy_stretch(played)
        known: dict[bytes, dict[str, float]] = {}
        for load, once in zip(self.rank_loads, self.updates, strict=True):
            rank = known.setdefault(load.key, {})
            if not rank:
                rank.update(self._rank_terms(load, once, shared))
            for name, value in rank.items():
                terms[name] += value / p * self.prices.drift
        idle = max(0.0, step - sum(terms.values()))
        # fill and drain cross every boundary once each way; the others wait beside compute
        hops = min(idle, self.fill_hops_s())
        terms["exposed.pp"] += hops
        terms["bubble"] = idle - hops
        excess = sum(terms.values()) / step
        return {name: value / excess for name, value in terms.items()}

    def _rank_terms(self, load: Load, once: Update, shared: float) -> dict[str, float]:
        """Busy terms of one pipeline rank per step; `shared` stretches its micro-batches."""
        m = self.phase.num_microbatches

        def micro(name: str) -> float:
            return m * float(load.total(self.costs, name)[0]) * shared

        def exposed(axis: str) -> float:
            return m * shared * float(sum(load.communication(self.costs, axis))[0])

        actions = self._actions_per_rank()
        terms = {
            "forward": micro("forward_s") + micro("host_forward_s") + float(once.dp.forward_s[0]),
            "backward": micro("backward_s")
            + micro("host_backward_s")
            + float(once.dp.backward_s[0]),
            "recompute": micro("recompute_s"),
            **{f"exposed.{axis}": exposed(axis) for axis in IN_LAYER_AXES},
            "exposed.copy": exposed("copy") + float(once.copy_s[0]),
            "exposed.dp": float(once.dp.exposed_s[0]),
            "optimizer": float(once.optimizer_s[0]),
            "host": float(once.host_s[0] + once.dp.host_s[0])
            + actions * self.prices.host("pp_action"),
        }
        if self.mesh.world > 1:
            axis = f"exposed.{self.mesh.wire_name().partition('+')[0]}"
            terms[axis] = terms.get(axis, 0.0) + float(once.norm_s[0])
        return terms

    def _actions_per_rank(self) -> float:
        """Pipeline actions of a step, mean over ranks; none without a pipeline."""
        if self.own_orders is not None:
            return sum(map(len, self.own_orders)) / self.mesh.pp
        # dualpipev splits few backwards, the other schedules all or none
        kinds = 3 if self.split and self.phase.schedule != "dualpipev" else 2
        return kinds * self.phase.num_microbatches * self.mesh.vpp if self.mesh.pp > 1 else 0

    def _busy_stretch(self, played: Played) -> float:
        """Played busy time over the busy time at full load: cores shared by fewer run faster."""
        if not self.shares_cores:
            return 1.0
        m = self.phase.num_microbatches
        full = sum(
            m * float(t.forward_s[0] + t.backward_s[0])
            for t in self._times(self.prices, self.costs)
        )
        return sum(played.busy_s) / full if full > 0 else 1.0

    def step_s(self, played: Played) -> float:
        """Makespan, then the longest exchange and update of any rank."""
        once = max(float(u.total_s[0]) for u in self.updates)
        return (played.makespan_s + once) * self.prices.drift


def _sum(times: list[StageTimes]) -> float:
    return sum(float(t.forward_s[0] + t.backward_s[0]) for t in times)


def estimate(plan: Plan, known: Known | None = None) -> Estimate:
    """The predicted cost of one optimiser step of a plan's first phase.

    With `known` what plans have in common is priced once. Raises InputError when the plan
    contradicts itself or its model is not covered.
    """
    plan.check()
    expert_offload.check(plan)
    sim = Simulation(plan, plan.phase, known)
    played = sim.played()
    step, terms = sim.step_s(played), sim.time_terms(played)
    peak = sim.memory()
    memory_terms = {name: float(value[0]) for name, value in peak.terms.items()}
    total = float(sum(memory_terms.values()))
    capacity = sim.pool.device.memory_bytes
    memory_spread = sim.pool.stack.memory_spread
    probability = _normal_cdf((capacity - total) / (memory_spread * total))
    tokens = plan.phase.seq_tokens * plan.workload.global_batch_seqs
    flops = tokens * plan.model.flops_per_token(plan.phase.seq_tokens)
    per_device = flops / step / sim.mesh.world
    peak_flops = sim.pool.device.peak_flops_per_s.get(sim.options.compute) or max(
        sim.pool.device.peak_flops_per_s.values()
    )
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
        evidence=_evidence(sim, terms),
    )


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
    profile = sim.prices.profile
    compute_spread = profile.spread if profile is not None else sim.pool.stack.spread
    measured_links = sim.prices.link_evidence == "measured"
    link_spread = LINK_SPREAD if measured_links else UNCERTAIN * sim.pool.stack.spread
    links = sum(value for name, value in terms.items() if name.startswith("exposed."))
    host = terms["host"]
    classes = (
        (step - links - host) * compute_spread,
        links * link_spread,
        host * UNCERTAIN * compute_spread,
    )
    return math.sqrt(sum((part / step) ** 2 for part in classes) + RUN_TO_RUN**2)


def _evidence(sim: Simulation, terms: dict[str, float]) -> dict[str, Evidence]:
    result: dict[str, Evidence] = {}
    for name in terms:
        if name.startswith("exposed."):
            result[name] = sim.prices.link_evidence
        else:
            result[name] = sim.prices.evidence
    result["memory"] = "measured" if sim.prices.profile is not None else "assumed"
    return result
