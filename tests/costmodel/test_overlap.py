"""Communication beside compute: bounds, laws, and what limits of prefetching cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.catalogs import load_cluster
from forerun.costmodel import estimate
from forerun.costmodel.overlap import Moved, felt_s, kept_share, moved
from forerun.costmodel.prices import Prices
from forerun.plan import Plan

from .changed import with_link, with_stack

MakePlan = Callable[..., Plan]
seconds = st.floats(1e-6, 10.0)
shares = st.floats(0.0, 1.0)


def prices(**changes: Any) -> Prices:
    pool = load_cluster("8xH100").pools[0]
    stack = msgspec.structs.replace(pool.stack, **changes)
    return Prices(msgspec.structs.replace(pool, stack=stack), None)


def felt(total: float, window: float, streaming: float, memory: float, **changes: Any) -> float:
    one = np.ones(1)
    communication = Moved(seconds=one * total, memory_s=one * total * memory)
    return float(felt_s(communication, one * window, one * streaming, prices(**changes))[0])


@given(total=seconds, window=seconds, streaming=shares, memory=shares)
def test_what_is_felt_lies_between_what_cannot_hide_and_all(
    total: float, window: float, streaming: float, memory: float
) -> None:
    taken = felt(total, window, streaming, memory)
    assert max(0.0, total - window) - 1e-12 <= taken <= total * (1 + 1e-12)
    assert felt(total, 2 * window, streaming, memory) <= taken * (1 + 1e-12)
    assert felt(total, window, streaming, memory, communication_sms=48) >= taken * (1 - 1e-12)


def test_hidden_communication_keeps_multiprocessors_from_matmuls_and_bandwidth_from_the_rest() -> (
    None
):
    """24 of 132: matmuls have 108 left. A third of the bandwidth taken: as long as it takes."""
    assert kept_share(prices()) == pytest.approx(24 / 108)
    assert felt(1.0, 2.0, 0.0, 0.3) == pytest.approx(24 / 108)
    assert felt(1.0, 2.0, 1.0, 0.3) == pytest.approx(0.3)
    assert felt(1.0, 2.0, 0.5, 0.3) == pytest.approx((24 / 108 + 0.3) / 2)
    assert felt(1.0, 2.0, 0.5, 0.3, can_overlap=False) == 1.0


def test_an_empty_buffer_takes_no_latency() -> None:
    one = np.ones(1)
    nothing = moved("all_gather", 0 * one, 8 * one, one, one, prices(collective_latency_s=1e-3))
    assert float(nothing.seconds[0]) == float(nothing.memory_s[0]) == 0.0


def exposed(plan: Plan) -> float:
    return estimate(plan).time_terms_s["exposed.dp"]


def test_units_gathered_ahead_hide_what_single_layers_cannot(make_plan: MakePlan) -> None:
    """Three dense layers before 58 with experts (DeepSeek): without room to gather ahead each layer
    has the one before it alone to hide behind; never better than all layers together."""
    options: dict[str, Any] = {"dp_shard": 64, "zero": 3, "ep": 8, "global_batch_seqs": 64}
    plan = make_plan("deepseek-v3", "8x8xH100", seq_tokens=4096, **options)
    times = [exposed(with_stack(plan, gathers_ahead=ahead)) for ahead in (1, 2, 4, 1000)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_like_layers_gain_nothing_from_gathering_further_ahead(make_plan: MakePlan) -> None:
    plan = make_plan(dp_shard=8, zero=3, seq_tokens=8192)
    near, far = (exposed(with_stack(plan, gathers_ahead=ahead)) for ahead in (1, 8))
    assert near == pytest.approx(far, rel=0.02)


def test_units_that_do_not_stream_are_felt_whole(make_plan: MakePlan) -> None:
    plan = make_plan(dp_shard=8, zero=3, seq_tokens=8192)
    waiting = with_stack(plan, streams_units=False)
    assert exposed(waiting) > 2 * exposed(plan)
    assert exposed(with_stack(waiting, unit_multiplier=2.0)) == pytest.approx(2 * exposed(waiting))
    assert exposed(with_stack(waiting, unit_by_tensor=True)) > exposed(waiting)


def test_the_first_gather_and_the_last_scatter_are_felt(make_plan: MakePlan) -> None:
    """However long the layers compute, embedding and head wait for their unit."""
    plan = make_plan(dp_shard=8, zero=3, seq_tokens=65536, global_batch_seqs=8, recompute="full")
    rest = 2 * plan.model.vocab * plan.model.hidden
    rate = plan.cluster.pools[0].intra_node.bytes_per_s
    assert exposed(plan) > rest * (2 + 4) * 7 / 8 / rate


def test_exchange_beside_the_last_backward(make_plan: MakePlan) -> None:
    plan = with_stack(make_plan(dp_replicate=8), sharding="megatron")
    beside = with_stack(plan, exchange_overlap=0.9)
    assert exposed(beside) < 0.5 * exposed(plan)
    sharded = with_stack(make_plan(dp_shard=8, zero=1), sharding="megatron", exchange_overlap=0.9)
    after = with_stack(sharded, sharded_exchange_overlap=0.0)
    assert exposed(sharded) < exposed(after)
    alone = with_stack(sharded, exchange_overlap=0.0)
    assert exposed(after) == pytest.approx(exposed(alone))


def test_gradients_that_are_not_cut_are_reduced_whole(make_plan: MakePlan) -> None:
    plan = with_stack(make_plan(dp_shard=8, zero=1), sharding="megatron")
    whole = with_stack(plan, sharded_reduce="all_reduce")
    params = plan.model.num_params
    wire = estimate(whole).bytes_on_wire
    assert wire["all_reduce@dp"] == pytest.approx(4 * params, rel=1e-9)
    assert wire["all_gather@dp"] == pytest.approx(2 * params, rel=1e-9)
    assert "reduce_scatter@dp" not in wire
    assert exposed(whole) > exposed(plan)


def felt_tp(plan: Plan) -> float:
    return estimate(plan).time_terms_s["exposed.tp"]


def test_cut_up_collectives_leave_a_first_part_and_slower_matmuls(make_plan: MakePlan) -> None:
    """Where matmuls are long enough, 1 / tp of the time and what the kernels keep of the device."""
    plan = with_stack(make_plan(tp=8, sp=True, global_batch_seqs=8), host_s_per_op=0.0)
    plan = with_link(plan, 10.0)  # so that the matmuls are long enough
    piped = with_stack(plan, pipelines_tensor_parallel=True)
    share = felt_tp(piped) / felt_tp(plan)
    assert share == pytest.approx(1 / 8 + 24 / 108, abs=0.06)


def test_sums_of_input_gradients_hide_behind_weight_gradients(make_plan: MakePlan) -> None:
    plan = with_stack(make_plan(tp=8, global_batch_seqs=8), host_s_per_op=0.0)
    beside = with_stack(plan, overlaps_weight_gradients=True)
    assert 0.5 * felt_tp(plan) < felt_tp(beside) < 0.9 * felt_tp(plan)
