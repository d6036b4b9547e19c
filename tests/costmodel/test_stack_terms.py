"""What a stack's data change in a prediction: exchange, overlap, kernels, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from forerun.costmodel import estimate
from forerun.costmodel.priced_pieces import Known
from forerun.plan import Plan

from .changed import with_device, with_stack, with_technique

MakePlan = Callable[..., Plan]


def terms(plan: Plan) -> dict[str, float]:
    return estimate(plan).time_terms_s


def test_a_distributed_optimizer_moves_gradients_and_parameters_once(make_plan: MakePlan) -> None:
    """Of 8.03 G parameters: fp32 gradients scattered, 16-bit parameters gathered."""
    plan = with_stack(make_plan(dp_shard=8, zero=1), sharding="megatron", reduce_bytes=4.0)
    wire = estimate(plan).bytes_on_wire
    params = plan.model.num_params
    assert wire["reduce_scatter@dp"] == pytest.approx(4 * params, rel=1e-9)
    assert wire["all_gather@dp"] == pytest.approx(2 * params, rel=1e-9)
    replicated = with_stack(make_plan(dp_replicate=8), sharding="megatron", reduce_bytes=2.0)
    assert estimate(replicated).bytes_on_wire == {
        "all_reduce@dp": pytest.approx(2 * params, rel=1e-9)
    }


def test_hidden_exchange_is_a_share_of_its_time(make_plan: MakePlan) -> None:
    plan = with_stack(make_plan(dp_shard=8, zero=1), sharding="megatron")
    half = with_stack(plan, data_parallel_multiplier=0.5)
    assert terms(half)["exposed.dp"] == pytest.approx(terms(plan)["exposed.dp"] / 2)
    sharded = with_stack(plan, distributed_optimizer_multiplier=2.0)
    assert terms(sharded)["exposed.dp"] == pytest.approx(terms(plan)["exposed.dp"] * 2)


def test_asynchronous_tensor_parallelism_cuts_collectives_up(make_plan: MakePlan) -> None:
    """As a stack does that pipelines all of them."""
    plan = with_stack(make_plan(tp=8, sp=True), host_s_per_op=0.0)
    cut = with_technique(plan, "tensor-parallel", **{"async": True})
    piped = with_stack(plan, pipelines_tensor_parallel=True)
    assert terms(cut)["exposed.tp"] == terms(piped)["exposed.tp"] < terms(plan)["exposed.tp"]
    whole = make_plan(tp=8)  # all-reduces cannot be cut up
    cut = with_technique(whole, "tensor-parallel", **{"async": True})
    assert terms(cut)["exposed.tp"] == terms(whole)["exposed.tp"]


def test_attention_stays_inside_packed_documents(make_plan: MakePlan) -> None:
    """Documents of a quarter of the sequence take a quarter of the attention's time at most."""
    plan = make_plan(gpus="1xH100", seq_tokens=32768, global_batch_seqs=1)
    plan = with_stack(plan, host_s_per_op=0.0)
    whole, packed, short = (
        terms(with_technique(plan, "attention", documents=length))["forward"]
        for length in (32768, 8192, 64)
    )
    assert whole == terms(plan)["forward"]
    attention = 4 * (whole - packed) / 3
    assert packed - short == pytest.approx(attention / 4, rel=0.1)
    # a ring of ranks has the same share of every document
    ring = make_plan(cp=8, seq_tokens=32768, global_batch_seqs=1)
    ring = with_stack(ring, ring_step_s=0.0, host_s_per_op=0.0)
    few, many = (
        terms(with_technique(ring, "attention", documents=length))["forward"]
        for length in (1024, 2048)
    )
    assert few < many < terms(ring)["forward"]


def test_a_power_limit_slows_matmuls_and_nothing_else(make_plan: MakePlan) -> None:
    plan = with_stack(
        make_plan(gpus="1xH100", seq_tokens=4096, global_batch_seqs=8), host_s_per_op=0.0
    )
    device = plan.cluster.pools[0].device
    assert device.power_watts == device.nominal_watts == 700.0
    limits = (700.0, 600.0, 500.0, 400.0, 200.0)
    steps = [estimate(with_device(plan, power_watts=watts)).step_s.median for watts in limits]
    assert steps == sorted(steps) and steps[0] == estimate(plan).step_s.median
    assert steps[0] / steps[2] > 0.863  # the clock, of which memory takes no notice
    assert with_device(plan, power_watts=900.0).cluster.pools[0].device.clock_fraction == 1.0
    assert terms(with_device(plan, power_watts=400.0))["optimizer"] == terms(plan)["optimizer"]


def test_gathers_in_fp8_move_half_the_bytes(make_plan: MakePlan) -> None:
    plan = make_plan(tp=8, sp=True, compute="fp8")
    low = with_stack(plan, low_precision_gather=True)
    wide, narrow = (estimate(p).bytes_on_wire["all_gather@tp"] for p in (plan, low))
    assert narrow < wide
    rowwise = with_technique(low, "precision", compute="fp8", recipe="rowwise")
    assert estimate(rowwise).bytes_on_wire["all_gather@tp"] == wide


def test_offloaded_activations_that_compute_does_not_hide_are_exposed(make_plan: MakePlan) -> None:
    plan = with_technique(make_plan(dp_shard=8, zero=3), "offload", activations=1.0)
    assert terms(plan)["exposed.copy"] > 0
    pool = plan.cluster.pools[0]
    assert pool.host is not None
    link = msgspec.structs.replace(pool.host, bytes_per_s=1e15, latency_s=0.0)
    cluster = msgspec.structs.replace(
        plan.cluster, pools=(msgspec.structs.replace(pool, host=link),)
    )
    assert terms(msgspec.structs.replace(plan, cluster=cluster))["exposed.copy"] == 0


def test_launches_bound_a_small_model_and_captured_graphs_free_it(make_plan: MakePlan) -> None:
    options: dict[str, Any] = {"seq_tokens": 512, "global_batch_seqs": 8, "dp_shard": 8, "zero": 1}
    plan = with_stack(make_plan("qwen2.5-0.5b", **options), host_s_per_op=5e-5)
    captured = with_technique(plan, "runtime", mode="graphs")
    assert estimate(captured).step_s.median < 0.5 * estimate(plan).step_s.median


def test_a_head_hides_launches_unless_the_host_waits_for_it(make_plan: MakePlan) -> None:
    """Its forward, that is: in backward it comes first, and layers are launched meanwhile."""
    options: dict[str, Any] = {"seq_tokens": 512, "global_batch_seqs": 8, "dp_replicate": 8}
    ahead = with_stack(make_plan("qwen2.5-0.5b", **options), host_s_per_op=5e-5)
    waits = with_stack(ahead, host_waits=True)
    assert estimate(waits).step_s.median > estimate(ahead).step_s.median
    large = make_plan(dp_shard=8, zero=3)  # nothing to hide
    assert terms(with_stack(large, host_waits=True)) == pytest.approx(terms(large), rel=0.01)


def test_every_micro_batch_costs_the_host_its_time(make_plan: MakePlan) -> None:
    plan = make_plan(dp_replicate=8, global_batch_seqs=32)
    each_s = 3e-3
    later = estimate(with_stack(plan, host_s_per_micro_batch=each_s)).step_s.median
    extra_s = plan.phase.num_microbatches * each_s
    assert later - estimate(plan).step_s.median == pytest.approx(extra_s, rel=0.05)


def test_compiled_layers_move_less(make_plan: MakePlan) -> None:
    plan = with_stack(make_plan(dp_shard=8, zero=3), compiled_elementwise=0.5, host_s_per_op=0.0)
    compiled = with_technique(plan, "runtime", mode="compiled")
    assert terms(compiled)["forward"] < terms(plan)["forward"]


def test_a_newer_attention_kernel_is_faster_and_an_eager_one_slower(make_plan: MakePlan) -> None:
    base = make_plan(dp_shard=8, zero=3, seq_tokens=8192)
    times = [
        estimate(with_technique(base, "attention", kernel=kernel)).step_s.median
        for kernel in ("flash3", "flash2", "flash1", "unfused", "eager")
    ]
    assert times == sorted(times) and len(set(times)) == len(times)


def test_full_recompute_without_an_early_end_repeats_the_last_matmul(make_plan: MakePlan) -> None:
    plan = make_plan(dp_shard=8, zero=3, recompute="full")
    early, whole = (with_stack(plan, recompute_stops_early=stops) for stops in (True, False))
    assert terms(whole)["recompute"] > terms(early)["recompute"]
    assert terms(whole)["recompute"] <= terms(whole)["forward"] * (1 + 1e-9)


def test_jitter_grows_with_the_devices(make_plan: MakePlan) -> None:
    plan = make_plan("llama-3.1-8b", "8x8xH100", dp_shard=64, zero=3, global_batch_seqs=64)
    drifting = with_stack(plan, drift_per_doubling=0.01)
    ratio = estimate(drifting).step_s.median / estimate(plan).step_s.median
    assert ratio == pytest.approx(1.03, rel=1e-9)


def test_a_group_uses_a_part_of_its_members_interfaces(make_plan: MakePlan) -> None:
    """tp 2 on nodes of 8 leaves four members of a group in a node, tp 8 one, which has its own;
    without tp they are neighbours."""

    def exchange_s(tp: int, share: float) -> float:
        plan = make_plan(gpus="16xH100", dp_replicate=16 // tp, tp=tp)
        plan = with_stack(plan, sharding="megatron", interface_sharing=share)
        return terms(plan)["exposed.dp"]

    assert exchange_s(2, 0.5) > 1.3 * exchange_s(2, 1.0)
    assert exchange_s(2, 0.1) == exchange_s(2, 0.25)
    assert exchange_s(8, 0.5) == exchange_s(8, 1.0)
    assert exchange_s(1, 0.5) == exchange_s(1, 1.0)


def test_copies_of_unsharded_parameters_may_be_freed_by_unit(make_plan: MakePlan) -> None:
    """Of fp32 parameters, as FSDP on one device keeps them."""
    plan = make_plan(gpus="1xH100", dp_shard=1)
    freed = with_stack(plan, frees_copies=True)
    copies = estimate(plan).memory_terms_bytes["gathered_parameters"]
    assert copies == pytest.approx(2 * plan.model.num_params, rel=1e-6)
    assert estimate(freed).memory_terms_bytes["gathered_parameters"] < copies / 4


def test_shared_pieces_change_nothing(make_plan: MakePlan) -> None:
    """Plans that differ in dp, pp, stage of ZeRO, length, or stack."""
    plans = [
        make_plan(dp_shard=8, zero=3),
        make_plan(dp_shard=8, zero=1),
        make_plan(dp_replicate=8),
        make_plan(dp_shard=4, zero=3, pp=2),
        make_plan(dp_shard=4, zero=3, tp=2),
        make_plan(dp_shard=4, zero=3, tp=2, sp=True),
        make_plan(dp_shard=4, zero=3, cp=2),
        make_plan(dp_shard=8, zero=3, seq_tokens=4096),
        make_plan(dp_shard=8, zero=3, recompute="full"),
        make_plan("mixtral-8x7b", dp_shard=8, zero=3, ep=8),
        make_plan("mixtral-8x7b", dp_shard=8, zero=3, ep=4),
    ]
    plans.append(with_stack(plans[0], elementwise_multiplier=3.0))
    known: Known = {}
    shared = [estimate(plan, known) for plan in plans]
    assert shared == [estimate(plan) for plan in plans]
    assert shared == [estimate(plan, known) for plan in plans]
    assert len(known) < 3 * len(plans)
