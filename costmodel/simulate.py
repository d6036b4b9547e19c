"""A plan played through: one phase with all its intermediate costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ..cluster import Pool
from ..errors import InputError
from ..estimate import TIME_TERMS
from ..local_sgd import LocalSgd
from ..model import Model
from ..orders import Action
from ..plan import Phase, Plan, even_sizes
from ..schedules import SPLIT_SCHEDULES, rank_of
from .away import first_fetch_s
from .copies import returns_at_once
from .graph import Array
from .groups import Grouped
from .in_flight import in_flight
from .kept import Kept
from .layer_tensors import check_names
from .layout import Layouts
from .memory import Peak
from .options import Options
from .pieces import Piece, Pieces
from .pipeline_pools import between_s, drift
from .priced_pieces import Known, pieces
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
from .stages import Load, for_each, stacked
from .techniques.local_sgd import Meetings, fragment_elements, meetings


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
        names = list(dict.fromkeys(stage.pool for stage in phase.stages))
        self.pools: list[Pool] = [plan.cluster.pool(name) for name in names]
        """Pools in the order of the pipeline."""
        self.layouts = Layouts.of(phase)
        self.options = Options.of(phase, plan.workload)
        self.grouped = Grouped.of(plan.model, phase, plan.workload)
        check_names(
            self.grouped.model, self.grouped.options, self.pools[0],
            sequence_parallel=phase.sequence_parallel,
        )  # fmt: skip
        mesh = self.mesh
        self.replicas = mesh.dp * mesh.cp * mesh.tp
        """Ranks that do the same work as one pipeline rank."""
        self.prices_of = [
            Prices(pool, plan.cluster.profile, min(mesh.world, pool.devices_together))
            for pool in self.pools
        ]
        self.costs_of = [self._pieces(prices) for prices in self.prices_of]
        self.stage_loads = self.grouped.loads(phase.stages)
        self.own_orders = phase.own_orders()
        self.owners = [rank_of(phase.schedule, i, mesh.pp) for i in range(mesh.num_stages)]
        """The rank of each stage."""
        self.pool_of_stage = [names.index(stage.pool) for stage in phase.stages]
        self.pool_of_rank = [self.pool_of_stage[self.owners.index(r)] for r in range(mesh.pp)]
        self.rank_loads = [
            self.grouped.load(
                [stage for stage, own in zip(phase.stages, self.owners, strict=True) if own == r]
            )
            for r in range(mesh.pp)
        ]
        self.first_fetch_s = [first_fetch_s(self, stage) for stage in range(mesh.num_stages)]
        """Of each stage and micro-batch, what its backward waits for before its first layer."""
        self.updates = self._updates()

        self.meetings: Meetings | None = self._meetings()
        """With other replicas, where they train apart."""

    def _meetings(self) -> Meetings | None:
        local = self.options.local_sgd
        return None if local is None else self.meetings_by(local)

    def meetings_by(self, local: LocalSgd) -> Meetings:
        """What meetings of the plan's replicas cost under some settings."""
        (load,) = self.rank_loads
        shard = float(self.layouts.shards[0])
        elements = fragment_elements(local, self.grouped.group_of.tolist(), self.costs, load, shard)
        return meetings(
            local,
            elements,
            self.mesh.dp_replicate,
            self.mesh.stride("dp_replicate"),
            int(self.layouts.together[0]),
            self.prices,
        )

    @property
    def pool(self) -> Pool:
        """The first stage's pool; in most clusters there is no other."""
        return self.pools[0]

    @property
    def prices(self) -> Prices:
        """What things cost there."""
        return self.prices_of[0]

    @property
    def costs(self) -> Pieces:
        """The pieces there."""
        return self.costs_of[0]

    @property
    def last_layer(self) -> Piece:
        """The model's last layer, where it lies."""
        return self.costs_of[self.pool_of_stage[-1]].layers[int(self.grouped.group_of[-1])]

    @property
    def drift(self) -> float:
        """Slow-down of a step by jitter and slow nodes."""
        return drift(self.plan.cluster.pools)

    @property
    def can_overlap(self) -> bool:
        """Whether transfers between stages run beside compute."""
        return all(pool.stack.can_overlap for pool in self.pools)

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

    def _times(self, prices: Sequence[Prices], costs: Sequence[Pieces]) -> list[StageTimes]:
        return for_each(
            self.stage_loads,
            lambda load, k: stage_times(load, costs[k], prices[k]),
            self.pool_of_stage,
        )

    def _updates(self) -> list[Update]:
        """What every rank does once per step; alike ranks once, those of a pool together."""
        keys = [
            (pool, load.key) for pool, load in zip(self.pool_of_rank, self.rank_loads, strict=True)
        ]
        found: dict[tuple[int, bytes], Update] = {}
        for k, prices in enumerate(self.prices_of):
            loads = {
                key: load for key, load in zip(keys, self.rank_loads, strict=True) if key[0] == k
            }
            layouts = self.layouts.take(np.zeros(len(loads), dtype=np.intp))
            every = update(
                stacked(list(loads.values())), self.costs_of[k], layouts, prices, self.options
            )
            found |= zip(loads, every.each(len(loads)), strict=True)
        return [found[key] for key in keys]

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
        hops = self.hops_s()
        shape = (self.phase.schedule, self.mesh.pp, self.mesh.vpp, self.phase.num_microbatches)
        if not self.shares_cores:
            durations = self.durations()
            hop = 0.0 if self.can_overlap else hops
            if self.own_orders is not None:
                played = play(self.own_orders, durations, hop)
            else:
                played = play_long(*shape, durations, hop)
            fill_s = self.fill_hops_s() if self.can_overlap else 0.0
            return replace(played, makespan_s=played.makespan_s + fill_s)
        alone = Prices(self.pool, self.plan.cluster.profile, self.replicas)
        costs = self._pieces(alone)
        base = self._times([alone], [costs])
        speeds = self.speeds(base)
        order = self.own_orders or orders(*shape)
        return play_shared(order, self._durations(base, [costs]), hops[0], speeds)

    def durations(self) -> Callable[[Action], float]:
        """Seconds of each action on a rank with cores of its own."""
        return self._durations(self._times(self.prices_of, self.costs_of), self.costs_of)

    def _durations(
        self, times: list[StageTimes], costs: Sequence[Pieces]
    ) -> Callable[[Action], float]:
        """Seconds of each action, with what neighbours lose when they meet after it.

        Splitting a backward takes no time beyond the host's for a further action: gradients of
        inputs and of weights come from kernels of their own either way.
        """

        where, first = self.pool_of_stage, self.first_fetch_s
        actions_s = [self._action_s(k) for k in where]

        def whole(compute_s: Array, stage: int) -> float:
            if self.mesh.pp == 1:
                return float(compute_s[0])
            replicas = np.array([float(self.replicas)])
            lost = self.prices_of[where[stage]].wait(compute_s, np.array([2.0]), replicas)
            return float(compute_s[0] + lost[0]) + actions_s[stage]

        seconds = {
            "F": [whole(t.forward_s, i) for i, t in enumerate(times)],
            "B": [whole(t.backward_s, i) + first[i] for i, t in enumerate(times)],
        }
        if self.split:
            weights = for_each(
                self.stage_loads, lambda load, k: load.total(costs[k], "weight_s"), where
            )
            pairs = enumerate(zip(times, weights, strict=True))
            seconds["I"] = [whole(t.backward_s - weight, i) + first[i] for i, (t, weight) in pairs]
            seconds["W"] = [
                float(weight[0]) + action_s
                for weight, action_s in zip(weights, actions_s, strict=True)
            ]

        def duration(action: Action) -> float:
            return seconds[action[0]][action[1]]

        return duration

    def _action_s(self, pool: int) -> float:
        """Host time of a pipeline action."""
        return self.prices_of[pool].host("pp_action") if self.mesh.pp > 1 else 0.0

    def speeds(self, base: list[StageTimes]) -> list[float]:
        """Speed of a pipeline rank when 1, 2, ... pp of them are busy; the first is 1."""
        total = _sum(base)
        result = [1.0]
        for busy_ranks in range(2, self.mesh.pp + 1):
            prices = Prices(self.pool, self.plan.cluster.profile, busy_ranks * self.replicas)
            result.append(total / _sum(self._times([prices], [self._pieces(prices)])))
        return result

    def hops_s(self) -> list[float]:
        """Transfer of one micro-batch's activations from every stage to the next."""
        own = [
            float(hop_s(costs, self.layouts, prices)[0])
            for costs, prices in zip(self.costs_of, self.prices_of, strict=True)
        ]
        if len(own) == 1:
            return own * max(1, self.mesh.num_stages - 1)
        sent = sent_bytes(self.costs.layers[0].boundary_bytes, self.layouts, self.prices)
        between = float(between_s(self.plan.cluster, sent)[0])
        return [own[a] if a == b else between for a, b in pairwise(self.pool_of_stage)]

    def fill_hops_s(self) -> float:
        """Transfers of fill and drain; where transfers run beside compute the others are hidden."""
        return 2 * sum(self.hops_s()[: self.mesh.pp - 1])

    def memory(self) -> tuple[Peak, Pool]:
        """Peak memory of the rank that fills most of its device, and its pool."""
        found = [(self._memory(k), pool) for k, pool in enumerate(self.pools)]
        return max(found, key=lambda x: float(x[0].total[0]) / x[1].device.memory_bytes)

    def _memory(self, pool: int) -> Peak:
        """Peak memory of the fullest rank on a pool."""
        ranks = [r for r in range(self.mesh.pp) if self.pool_of_rank[r] == pool]
        simple = len(self.phase.settings) <= 1 and not self.split and self.own_orders is None
        if self._evenly_cut and simple:
            # those between hold less of the same than the second
            ranks = sorted({0, min(1, self.mesh.pp - 1), self.mesh.pp - 1})
        peak = self.memory_of(ranks)
        fullest = int(np.argmax(peak.total))
        terms = {name: value[fullest : fullest + 1] for name, value in peak.terms.items()}
        return Peak(total=peak.total[fullest : fullest + 1], terms=terms)

    def memory_of(self, ranks: Sequence[int]) -> Peak:
        """Peak memory of some pipeline ranks of one pool, each at its own peak."""
        pool = self.pool_of_rank[ranks[0]]
        costs, prices = self.costs_of[pool], self.prices_of[pool]
        load = stacked([self.rank_loads[rank] for rank in ranks])
        layouts = self.layouts.take(np.zeros(len(ranks), dtype=np.intp))
        shape = (self.mesh.pp, self.mesh.vpp, self.phase.num_microbatches)
        kept = Kept.of(costs, self.layouts, prices.pool.stack)
        flight = in_flight(
            self.phase.schedule, shape, np.array(ranks), load, kept, layouts, self.own_orders
        )
        peak = rank_memory(load, costs, layouts, prices, self.options, flight)
        one = np.zeros(len(ranks))
        return Peak(total=peak.total + one, terms={n: v + one for n, v in peak.terms.items()})

    @property
    def _evenly_cut(self) -> bool:
        """Whether stages are as even as can be, all on one pool."""
        sizes = tuple(stage.num_layers for stage in self.phase.stages)
        return len(self.pools) == 1 and sizes == even_sizes(sum(sizes), len(sizes))

    def wire_bytes(self) -> dict[str, float]:
        """Bytes handed to each collective, per rank and step, mean over ranks."""
        m = self.phase.num_microbatches
        total: dict[str, float] = {}

        def add(name: str, value: Array | float) -> None:
            number = float(np.asarray(value).reshape(-1)[0])
            if number != 0:
                total[name] = total.get(name, 0.0) + number / self.mesh.pp

        each = zip(self.rank_loads, self.updates, self.pool_of_rank, strict=True)
        for load, step, pool in each:
            for count, piece in load.each(self.costs_of[pool]):
                for name, value in piece.wire_bytes.items():
                    add(name, count * value * m)
            for name, value in step.dp.wire_bytes.items():
                add(name, value)
            uncut = load.total(self.costs_of[pool], "uncut_gradient_bytes")
            add("all_reduce@tp", uncut / step.dp.shard)
        last = self.last_layer
        if last.again_wire_bytes:  # where its backward follows at once it is all there still
            for name, value in last.again_wire_bytes.items():
                add(name, -returns_at_once(self.phase) * value)
        synced = self.phase.synced
        if self.options.clips and synced.world > 1:
            add(f"all_reduce@{synced.reduction_name()}", 4.0 * self.mesh.pp)
        if self.meetings is not None:
            for name, value in self.meetings.wire_bytes().items():
                add(name, value)
            if synced.world > 1:
                gap_bytes = self.meetings.gap_bytes / self.meetings.settings.period
                add(f"all_reduce@{synced.reduction_name()}", gap_bytes)
        if self.mesh.pp > 1:
            boundary = self.costs.layers[0].boundary_bytes
            crossings = 2 * sum(a != b for a, b in pairwise(self.owners))
            add("send@pp", sent_bytes(boundary, self.layouts, self.prices) * m * crossings)
            if self.plan.model.tied_embeddings and self.owners[-1] != self.owners[0]:
                table_bytes = 4.0 * self.costs.tied_trained / self.updates[0].dp.shard
                add("all_reduce@pp", 2 * table_bytes)
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
        known: dict[tuple[bytes, int], dict[str, float]] = {}
        for load, once, pool in zip(self.rank_loads, self.updates, self.pool_of_rank, strict=True):
            rank = known.setdefault((load.key, pool), {})
            if not rank:
                rank.update(self._rank_terms(load, once, pool, shared))
            for name, value in rank.items():
                terms[name] += value / p * self.drift
        fetched = sum(self.first_fetch_s) * self.phase.num_microbatches
        terms["exposed.copy"] += fetched / p * self.drift
        if self.meetings is not None:
            terms["exposed.dp"] += self.meetings.exposed_s(self.inner_step_s(played))
            terms["optimizer"] += self.meetings.work_s
        idle = max(0.0, step - sum(terms.values()))
        # fill and drain cross every boundary once each way; the others wait beside compute
        hops = min(idle, self.fill_hops_s())
        terms["exposed.pp"] += hops
        terms["bubble"] = idle - hops
        excess = sum(terms.values()) / step
        return {name: value / excess for name, value in terms.items()}

    def _rank_terms(self, load: Load, once: Update, pool: int, shared: float) -> dict[str, float]:
        """Busy terms of one pipeline rank per step; `shared` stretches its micro-batches."""
        m, costs = self.phase.num_microbatches, self.costs_of[pool]

        def micro(name: str) -> float:
            return m * float(load.total(costs, name)[0]) * shared

        def exposed(axis: str) -> float:
            there, back = load.communication(costs, axis)
            return m * shared * float((there + back)[0])

        actions = self._actions_per_rank()
        host, host_back = (m * shared * float(x[0]) for x in load.host_s(costs))
        terms = {
            "forward": micro("forward_s") + host + float(once.dp.forward_s[0]),
            "backward": micro("backward_s") + host_back + float(once.dp.backward_s[0]),
            "recompute": micro("recompute_s"),
            **{f"exposed.{axis}": exposed(axis) for axis in IN_LAYER_AXES},
            "exposed.copy": exposed("copy") + float(once.states.exposed_s[0]),
            "exposed.dp": float(once.dp.exposed_s[0]),
            "optimizer": float(once.optimizer_s[0]),
            "host": float(once.host_s[0] + once.dp.host_s[0])
            + actions * self.prices_of[pool].host("pp_action"),
        }
        synced = self.phase.synced
        if synced.world > 1:
            axis = f"exposed.{synced.reduction_name().partition('+')[0]}"
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
            for t in self._times(self.prices_of, self.costs_of)
        )
        return sum(played.busy_s) / full if full > 0 else 1.0

    def step_s(self, played: Played) -> float:
        """An inner step and, in the mean, what it has of meetings with other replicas."""
        inner_s = self.inner_step_s(played)
        if self.meetings is None:
            return inner_s
        return inner_s + self.meetings.exposed_s(inner_s) + self.meetings.work_s

    def inner_step_s(self, played: Played) -> float:
        """Makespan, then the longest exchange and update of any rank."""
        once = max(float(u.total_s[0]) for u in self.updates)
        return (played.makespan_s + once) * self.drift


def _sum(times: list[StageTimes]) -> float:
    return sum(float(t.forward_s[0] + t.backward_s[0]) for t in times)


def step_seconds(plan: Plan, known: Known | None = None) -> float:
    """The median of the estimate's step time, and nothing else."""
    plan.check()
    sim = Simulation(plan, plan.phase, known)
    return sim.step_s(sim.played())
