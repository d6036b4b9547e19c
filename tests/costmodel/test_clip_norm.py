"""Clipping by the norm of all gradients: a number on the wire, a pass over what a rank owns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from forerun.costmodel import estimate
from forerun.errors import InputError
from forerun.plan import Plan
from forerun.workload import Workload

MakePlan = Callable[..., Plan]


def clipped(plan: Plan) -> Plan:
    return replace(plan, workload=replace(plan.workload, clip_norm=1.0))


@pytest.mark.parametrize(
    ("degrees", "name"),
    [
        ({"pp": 4, "dp_shard": 2, "zero": 1}, "all_reduce@pp+dp"),
        ({"tp": 8}, "all_reduce@tp"),
        ({"dp_replicate": 2, "dp_shard": 4, "zero": 3}, "all_reduce@dp"),
    ],
)
def test_clipping_adds_one_number_and_some_time(
    make_plan: MakePlan, degrees: dict[str, int], name: str
) -> None:
    plan = make_plan(**degrees)
    before, after = estimate(plan), estimate(clipped(plan))
    more = {
        key: size - before.bytes_on_wire.get(key, 0.0)
        for key, size in after.bytes_on_wire.items()
        if size != before.bytes_on_wire.get(key, 0.0)
    }
    assert more == {name: pytest.approx(4.0)}
    assert after.step_s.median > before.step_s.median
    assert after.time_terms_s["optimizer"] > before.time_terms_s["optimizer"]
    assert sum(after.time_terms_s.values()) == pytest.approx(after.step_s.median)
    assert after.memory_terms_bytes == before.memory_terms_bytes


def test_one_process_exchanges_nothing(make_plan: MakePlan) -> None:
    plan = make_plan("tiny-1m", "1xcpu", seq_tokens=128, global_batch_seqs=4, compute="fp32")
    assert estimate(clipped(plan)).bytes_on_wire == {}


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_is_a_positive_number(norm: float) -> None:
    with pytest.raises(InputError, match="clip-norm="):
        Workload(seq_tokens=8, global_batch_seqs=1, clip_norm=norm)
