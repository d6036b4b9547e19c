"""What ranks lose where they meet, and the copies around a split sequence."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from forerun import Mesh, PlanFile, Profile
from forerun.cluster import WaitCurve
from forerun.costmodel import estimate
from forerun.costmodel.curves import affine_time
from forerun.plan import Plan


def _with(plan: Plan, mesh: Mesh, profile: Profile | None = None) -> Plan:
    cluster = msgspec.structs.replace(plan.cluster, profile=profile or plan.cluster.profile)
    phase = msgspec.structs.replace(plan.phase, mesh=mesh)
    if mesh.tp > 1:
        phase = msgspec.structs.replace(phase, num_microbatches=2)
    return msgspec.structs.replace(plan, cluster=cluster, phases=(phase,))


def test_noisy_points_give_a_line_that_never_falls() -> None:
    line = affine_time([1.0, 2.0, 8.0], [3.0, 1.0, 2.0], np.array([0.0, 10.0, 100.0]))
    assert 0 <= line[0] <= line[1] <= line[2]


@pytest.mark.parametrize("mesh", [Mesh(dp_replicate=2), Mesh(tp=2)], ids=["ddp", "tp"])
def test_each_meeting_costs_its_wait(plan_file: PlanFile, mesh: Mesh) -> None:
    """DDP meets once a step; tp 4 times per layer, once in the embedding, 4 times in the head."""
    base = plan_file.plan.cluster.profile
    assert base is not None
    wait_s = 1e-3
    curve = WaitCurve(group=2, compute_s=(1e-3, 1e-2), seconds=(wait_s, wait_s))
    waiting = msgspec.structs.replace(base, waits=(curve,))
    without = estimate(_with(plan_file.plan, mesh))
    with_waits = estimate(_with(plan_file.plan, mesh, waiting))
    axis = "exposed.tp" if mesh.tp > 1 else "exposed.dp"
    meetings = 1 if axis == "exposed.dp" else 2 * (4 * 2 + 1 + 4)
    more = with_waits.time_terms_s[axis] - without.time_terms_s[axis]
    assert more == pytest.approx(meetings * wait_s, rel=1e-6)
    assert with_waits.step_s.median - without.step_s.median == pytest.approx(more, rel=1e-6)


def test_a_split_sequence_is_copied_around_its_collectives(plan_file: PlanFile) -> None:
    """Only where the stack is batch-major and there is more than one sequence."""

    def forward_s(copies: bool, micro_batch_seqs: int) -> float:
        plan = _with(plan_file.plan, Mesh(tp=2))
        pool = plan.cluster.pools[0]
        stack = msgspec.structs.replace(pool.stack, sequence_copies=copies)
        pools = (msgspec.structs.replace(pool, stack=stack),)
        phase = msgspec.structs.replace(
            plan.phase,
            sequence_parallel=True,
            micro_batch_seqs=micro_batch_seqs,
            num_microbatches=4 // micro_batch_seqs,
        )
        cluster = msgspec.structs.replace(plan.cluster, pools=pools)
        changed = msgspec.structs.replace(plan, cluster=cluster, phases=(phase,))
        return estimate(changed).time_terms_s["forward"]

    assert forward_s(True, 2) > forward_s(False, 2)
    assert forward_s(True, 1) == forward_s(False, 1)
