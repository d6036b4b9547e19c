"""Replicas that train apart, as a plan says it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun import InputError, Mesh, Plan, PlanFile
from forerun.local_sgd import BLOCK, LocalSgd, message_bytes

LAYERS = 2


def with_local(plan_file: PlanFile, settings: dict[str, Any], **phase: Any) -> Plan:
    """The plan with replicas that meet so."""
    plan = plan_file.plan
    own = tuple(
        msgspec.structs.replace(s, techniques=s.techniques | {"local-sgd": settings})
        for s in plan.phase.settings
    )
    changed = msgspec.structs.replace(plan.phase, settings=own, **phase)
    return msgspec.structs.replace(plan, phases=(changed,))


def test_a_plan_says_which_replicas_are_one(plan_file: PlanFile) -> None:
    plan = with_local(plan_file, {"period": 8, "fragments": 2, "delay": 3, "bits": 4})
    plan.check()
    assert plan.phase.mesh.dp_replicate == 2 and plan.phase.synced == Mesh()
    assert plan.label == "2xdiloco-8x2-d3-4bit_mbs2x1_fp32"
    assert plan_file.plan.phase.synced == plan_file.plan.phase.mesh
    assert plan_file.plan.phase.local_sgd is None


BAD: list[tuple[dict[str, Any], str]] = [
    ({"period": 0}, "local-sgd.period=0: not positive"),
    ({"period": 4, "fragments": 3}, "local-sgd.fragments=3: are groups of the 2 layers"),
    ({"period": 5, "fragments": 2}, "local-sgd.fragments=2: do not divide period=5"),
    ({"period": 4, "fragments": 2, "delay": 2}, "local-sgd.delay=2: the next fragment is sent "
     "after 2 steps; give 0 to 1"),
    ({"period": 4, "delay": -1}, "local-sgd.delay=-1"),
    ({"period": 4, "bits": 16}, "local-sgd.bits=16: no width that can be sent; use 4, 8 or 32"),
    ({"period": 4, "outer": "co2", "bits": 8}, "local-sgd.bits=8: co2 sends fp32"),
    ({"period": 4, "outer": "co2", "delay": 2}, "give 0 or 4"),
    ({"period": 4, "outer": "co2", "fragments": 2}, "co2 sends the whole model at once"),
    ({"period": 4, "outer": "average", "delay": 1}, "an average of parameters is used at once"),
    ({"period": 4, "outer": "average", "momentum": 0.5}, "averaging has no outer optimiser"),
    ({"period": 4, "alpha": 2.0}, "local-sgd.alpha=2.0: out of range"),
    ({"period": 4, "penalty": 2.0}, "diloco has none"),
    ({"period": 4, "fragmants": 2}, "unknown field"),
    ({"period": "often"}, "local-sgd="),
    ({"period": 4, "outer": "hourly"}, "local-sgd="),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_cannot_be_are_refused(
    plan_file: PlanFile, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        with_local(plan_file, settings).check()
    assert message in str(refused.value) and refused.value.remedy


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mesh": Mesh(tp=2)}, "dp_replicate=1: there is one replica"),
        ({"mesh": Mesh(dp_shard=2), "zero": 3}, "dp_replicate=1: there is one replica"),
    ],
)
def test_one_replica_has_none_to_meet(
    plan_file: PlanFile, changed: dict[str, Any], message: str
) -> None:
    plan = with_local(plan_file, {"period": 4}, **changed)
    seqs = plan.phase.micro_batch_seqs * plan.phase.mesh.dp
    workload = msgspec.structs.replace(plan.workload, global_batch_seqs=seqs)
    with pytest.raises(InputError, match=message):
        msgspec.structs.replace(plan, workload=workload).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"period": 7},
        {"period": 6, "outer": "co2", "penalty": 2.0, "clip": 0.5},
        {"period": 8, "outer": "average", "fragments": 2},
        {"period": 8, "fragments": 2, "delay": 1, "bits": 8, "alpha": 0.1, "momentum": 0.5},
    ],
)
def test_settings_are_read_as_they_are_written(settings: dict[str, Any]) -> None:
    local = LocalSgd.of(settings)
    assert local is not None
    assert LocalSgd.of(local.settings()) == local
    assert list(local.problems(LAYERS)) == []


@given(elements=st.integers(1, 10**7), ranks=st.integers(2, 16), bits=st.sampled_from([4, 8]))
def test_a_message_holds_all_codes_in_equal_parts(elements: int, ranks: int, bits: int) -> None:
    size = message_bytes(elements, ranks, bits)
    assert size % ranks == 0
    assert size >= elements * bits / 8
    assert size <= (elements + ranks * BLOCK) * (bits / 8 + 4 / BLOCK)


@given(st.integers(1, 12), st.integers(1, 20))
def test_fragments_are_sent_evenly_spaced(fragments: int, apart: int) -> None:
    local = LocalSgd(period=fragments * apart, fragments=fragments)
    starts = [local.starts(which) for which in range(fragments)]
    assert starts == [apart * (which + 1) for which in range(fragments)]
