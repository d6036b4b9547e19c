"""Plans whose steps share out sequences of unequal length: the groups of every step, and the price.

A plan says how (`static`, `flexsp`, `hdp`); the groups of a step follow from its lengths, which
depend on the job's seed and the step alone:

    static   every sequence on groups of the plan's degree
    flexsp   groups of unequal sizes, all meeting after each micro-batch (`solve_groups`)
    hdp      groups of unequal sizes, each rank with its own number of passes (`solve_hybrid`)

Where nothing in a pass makes all ranks meet (ZeRO 0 and 1) sequences of one degree are balanced
without meetings, too. The solvers' costs are the cost model's; a found step is priced by the cost
model again, pass by pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from ..costmodel.unequal import GroupPass, Step, estimate_steps, meets_each, with_empty
from ..errors import InputError, NoFeasiblePlan
from ..estimate import Estimate
from ..plan import Phase, Plan, Setting
from .sequences import Assignment, Costs, model_costs, solve_groups, solve_hybrid

SAMPLED_STEPS = 8
"""Steps that a plan is priced by."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the steps of one plan are shared out: the plan, and what sequences cost on groups."""

    plan: Plan
    costs: Costs

    @staticmethod
    def of(plan: Plan) -> Sharing:
        """The costs of a plan's model on its ranks.

        Raises InputError for a sequence that no group holds, NoFeasiblePlan where none fits.
        """
        phase, setting = plan.phase, plan.phase.technique("unequal")
        costs = model_costs(
            plan.model,
            plan.cluster,
            zero=phase.zero,
            recompute=phase.recompute,
            kind=setting.get("kind"),
            tokens_per_rank=setting.get("tokens_per_rank"),
            compute=phase.compute_dtype,
        )
        if phase.unequal == "static":
            degree = int(setting.get("degree", 1))
            if degree not in costs.degrees:
                allowed = ", ".join(map(str, costs.degrees))
                raise InputError("unequal.degree", degree, f"is not possible for {plan.model.name}",
                                 f"use one of {allowed}")  # fmt: skip
            costs = costs.of([degree])
        return Sharing(plan, costs)

    def lengths(self, step: int) -> tuple[int, ...]:
        """Lengths of the sequences of a step."""
        workload = self.plan.workload
        assert workload.lengths is not None
        return workload.lengths.drawn(
            workload.seq_tokens, workload.seed, step, workload.global_batch_seqs, workload.buckets
        )

    def step(self, step: int) -> Step:
        """The passes of a step, those without sequences included."""
        phase, lengths = self.plan.phase, self.lengths(step)
        meets, ranks = meets_each(phase), phase.mesh.world
        if phase.unequal == "flexsp" or meets:
            found = solve_groups(lengths, self.costs, ranks, certify=False)
        else:
            found = solve_hybrid(lengths, self.costs, ranks)
        return with_empty(list(_passes(found, lengths)), ranks, meets=meets)

    def estimate(self, steps: Iterable[int] = range(SAMPLED_STEPS)) -> Estimate:
        """The mean of these steps."""
        return estimate_steps(self.plan, [self.step(step) for step in steps])


def _passes(found: Assignment, lengths: tuple[int, ...]) -> Iterable[GroupPass]:
    for meeting, batch in enumerate(found.micro_batches):
        for p in batch.groups:
            yield GroupPass(
                start=p.start,
                degree=p.degree,
                kind=p.kind,
                sequences=p.sequences,
                lengths=tuple(lengths[i] for i in p.sequences),
                meeting=meeting,
            )


def estimate(plan: Plan) -> Estimate:
    """The predicted cost of a step of a plan with unequal groups, the mean of its first steps."""
    plan.check()
    return Sharing.of(plan).estimate()


def with_best_degree(plan: Plan) -> Plan:
    """A static plan with the fastest degree that holds the longest sequence."""
    best: tuple[float, Plan] | None = None
    longest = max(max(Sharing(plan, _any_degree(plan)).lengths(s)) for s in range(SAMPLED_STEPS))
    costs = _any_degree(plan)
    for degree, capacity in zip(costs.degrees, costs.capacity_tokens, strict=True):
        if capacity < longest:
            continue
        chosen = _with_setting(plan, degree=degree)
        try:
            seconds = estimate(chosen).step_s.median
        except NoFeasiblePlan:
            continue
        if best is None or seconds < best[0]:
            best = (seconds, chosen)
    if best is None:
        raise NoFeasiblePlan(f"no group of up to {costs.degrees[-1]} ranks holds {longest} tokens",
                             "use more GPUs, recompute, or a lower --seq-len")  # fmt: skip
    return best[1]


def _any_degree(plan: Plan) -> Costs:
    return Sharing.of(_with_setting(plan, mode="hdp" if plan.phase.zero < 2 else "flexsp")).costs


def _with_setting(plan: Plan, **changes: object) -> Plan:
    """The plan with other settings of its groups."""
    phase: Phase = plan.phase
    settings = tuple(
        Setting(
            layers=s.layers,
            techniques={**s.techniques, "unequal": {**s.techniques["unequal"], **changes}},
        )
        for s in phase.settings
    )
    replace = msgspec.structs.replace
    return replace(plan, phases=(replace(phase, settings=settings),))
