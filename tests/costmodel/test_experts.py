"""Routed experts: parameters, FLOPs, bytes and collectives against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster, load_model
from forerun.costmodel import Layouts, bound_layouts, estimate
from forerun.costmodel.exposed import forward_collectives, wire_bytes
from forerun.costmodel.graph import Graph, Sizes, volume
from forerun.costmodel.layers import decoder_layer, embedding, head
from forerun.costmodel.layout import local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.costmodel.prices import Prices
from forerun.costmodel.state_bytes import StateBytes
from forerun.costmodel.techniques import apply
from forerun.errors import InputError
from forerun.layout_rules import layout_problems
from forerun.mesh import Mesh
from forerun.model import Model
from forerun.plan import Plan, Setting

from .graphs import forward_flops, layer_graph, layouts_of, moved, num_bytes

MakePlan = Callable[..., Plan]

PRICES = Prices(load_cluster("8xH100").pools[0], None)
SEQ = 4096
H, HEADS, KV, HEAD, FFN, EXPERTS, TOP_K = 4096, 32, 8, 128, 14336, 8, 2
"""Mixtral 8x7B (arXiv 2401.04088, table 1)."""


@pytest.mark.parametrize(
    "name", ["mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-120b", "deepseek-v3"]
)
def test_graphs_hold_every_parameter_once(name: str) -> None:
    model, options = load_model(name), Options(compute="bf16")
    total = 0.0
    for layer in model.layers:
        graph = decoder_layer(model, layer, sequence_parallel=False, fused=True, options=options)
        sizes = local_sizes(model, layer, layouts_of(), SEQ)
        both = [float(graph.num_params(sizes, experts=experts)[0]) for experts in (False, True)]
        assert sum(both) == layer.num_params(model.hidden)
        assert (both[1] > 0) == (layer.experts is not None)
        total += layer.repeat * sum(both)
    sizes = local_sizes(model, model.layers[0], layouts_of(), SEQ)
    total += float(embedding(model, sequence_parallel=False).num_params(sizes)[0])
    total += float(head(model, sequence_parallel=False, fused=True).num_params(sizes)[0])
    assert total == model.num_params


def test_ep_divides_experts_and_tp_their_width() -> None:
    graph, sizes = layer_graph("mixtral-8x7b", SEQ, ep=4, tp=2)
    assert float(graph.num_params(sizes, experts=True)[0]) == EXPERTS * 3 * H * FFN / 8
    whole, whole_sizes = layer_graph("mixtral-8x7b", SEQ)
    router = next(w for w in whole.weights if w.name == "router.weight")
    assert volume(router.axes, sizes) == volume(router.axes, whole_sizes) == H * EXPERTS


def test_matmul_flops_are_those_of_the_active_parameters() -> None:
    graph, sizes = layer_graph("mixtral-8x7b", SEQ)
    active = 2 * H * HEAD * (HEADS + KV) + H * EXPERTS + TOP_K * 3 * H * FFN
    assert forward_flops(graph, sizes, ("linear", "grouped_linear")) == 2 * active * SEQ


def test_a_shared_expert_adds_its_width() -> None:
    model = load_model("deepseek-v3")
    graph, sizes = layer_graph(model, SEQ, group=1)
    attention = model.layers[1].attention_params(model.hidden) - 1536 - 512  # without its two norms
    active = attention + 7168 * 256 + (8 + 1) * 3 * 7168 * 2048
    assert forward_flops(graph, sizes, ("linear", "grouped_linear")) == 2 * active * SEQ


def test_backward_of_grouped_matmuls_is_twice_the_forward() -> None:
    kind = KINDS["grouped_linear"]
    shape = [np.array([float(n)]) for n in (1024, 512, 256, 8)]
    assert kind.forward_flops(shape)[0] == 2 * 1024 * 512 * 256
    assert kind.backward_flops(shape)[0] == 2 * kind.forward_flops(shape)[0]
    # every local expert's weights are read, however few rows it has
    assert kind.forward_bytes(shape, 2)[0] == 2 * (1024 * (512 + 256) + 8 * 512 * 256)


def test_saved_activations_of_a_mixtral_layer() -> None:
    """Bytes per token: two norms' inputs and outputs, attention, router, rows, experts."""
    graph, sizes = layer_graph("mixtral-8x7b", SEQ)
    norms = 4 * 2 * H + 2 * 4
    attention = 4 * HEADS * HEAD + 4 * KV * HEAD + 4 * HEADS
    router = 4 * EXPERTS + TOP_K * (4 + 8)  # probabilities, weights, places of rows
    rows = TOP_K * (2 * H + 2 * H)  # into the experts, and back from them
    experts = TOP_K * 3 * 2 * FFN  # gate, up, and their product
    assert liveness(graph, sizes).saved[0] / SEQ == norms + attention + router + rows + experts


def test_all_to_all_moves_each_token_top_k_times(make_plan: MakePlan) -> None:
    graph, sizes = layer_graph("mixtral-8x7b", SEQ, ep=8)
    exchanges = moved(graph, "ep")
    assert [c.kind for c in exchanges] == ["all_to_all", "all_to_all"]
    assert num_bytes(exchanges, sizes) == 2 * SEQ * TOP_K * H * 2
    assert moved(graph, "ep", "backward") == exchanges
    plan = make_plan("mixtral-8x7b", dp_shard=8, ep=8, zero=1, seq_tokens=SEQ, global_batch_seqs=16)
    result = estimate(plan)
    micro_batches, layers = 2, 32
    rows, counts = 4 * SEQ * TOP_K * H * 2, EXPERTS * 8
    assert result.bytes_on_wire["all_to_all@ep"] == micro_batches * layers * (rows + counts)
    assert result.time_terms_s["exposed.ep"] > 0


def test_without_expert_parallelism_nothing_is_exchanged(make_plan: MakePlan) -> None:
    plan = make_plan("mixtral-8x7b", dp_shard=8, zero=3, seq_tokens=SEQ, global_batch_seqs=16)
    result = estimate(plan)
    assert "all_to_all@ep" not in result.bytes_on_wire
    assert result.time_terms_s["exposed.ep"] == 0


def test_sequence_parallel_ranks_dispatch_their_own_part() -> None:
    """Rows are gathered over tp for the matmuls; without sp each tp rank sends the whole."""
    alone, sizes = layer_graph("mixtral-8x7b", SEQ, tp=4, ep=2)
    split, split_sizes = layer_graph("mixtral-8x7b", SEQ, tp=4, ep=2, sequence_parallel=1)
    assert num_bytes(moved(alone, "ep"), sizes) == 2 * SEQ * TOP_K * H * 2
    assert num_bytes(moved(split, "ep"), split_sizes) == 2 * SEQ * TOP_K * H * 2 / 4
    rows = moved(split, "expert_tp")
    assert [c.kind for c in rows] == ["all_gather", "reduce_scatter"]
    assert num_bytes(rows, split_sizes) == 2 * SEQ * TOP_K * H * 2
    for graph, local in ((alone, sizes), (split, split_sizes)):
        flops = forward_flops(graph, local, ("grouped_linear",))
        assert flops == 2 * SEQ * TOP_K * 3 * H * FFN / 4


def test_the_tensor_parallel_edge_of_experts_is_as_small_as_that_of_a_dense_mlp() -> None:
    graph, sizes = layer_graph("mixtral-8x7b", SEQ, tp=4)
    reduced = moved(graph, "tp")
    assert [c.kind for c in reduced] == ["all_reduce", "all_reduce"]
    assert num_bytes(reduced, sizes) == 2 * SEQ * H * 2


def _with_capacity(model: Model, factor: float) -> Model:
    layer = model.layers[0]
    assert layer.experts is not None
    experts = msgspec.structs.replace(layer.experts, capacity_factor=factor)
    return msgspec.structs.replace(model, layers=(msgspec.structs.replace(layer, experts=experts),))


def test_a_capacity_factor_scales_rows() -> None:
    model = load_model("mixtral-8x7b")
    graph, sizes = layer_graph(_with_capacity(model, 1.5), SEQ, ep=2)
    assert num_bytes(moved(graph, "ep"), sizes) == 1.5 * 2 * SEQ * TOP_K * H * 2
    flops = forward_flops(graph, sizes, ("grouped_linear",))
    assert flops == 1.5 * 2 * SEQ * TOP_K * 3 * H * FFN


def test_rules_of_expert_parallelism() -> None:
    assert Mesh(dp_replicate=8, ep=8).world == 8  # replicated ranks lend themselves too
    with pytest.raises(InputError, match=r"^ep=3: does not divide dp\*cp=8"):
        Mesh(dp_replicate=8, ep=3)
    problems = layout_problems(
        load_model("mixtral-8x7b"), Mesh(dp_shard=16, ep=16), seq_tokens=SEQ, zero=1,
        sequence_parallel=False, schedule="1f1b", num_microbatches=1,
    )  # fmt: skip
    assert next(str(p) for p in problems).startswith("ep=16: does not divide 8 experts")


@given(
    tp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2]), ep=st.sampled_from([1, 2, 4]),
    zero=st.sampled_from([0, 1, 3]), sp=st.booleans(),
    recompute=st.sampled_from(["none", "selective", "full"]),
)  # fmt: skip
@settings(max_examples=20)
def test_bound_never_exceeds_the_simulator(
    make_plan: MakePlan, tp: int, pp: int, ep: int, zero: int, sp: bool, recompute: str
) -> None:
    dp = 16 // (tp * pp)
    plan = make_plan(
        "mixtral-8x7b", "2x8xH100", seq_tokens=2048, global_batch_seqs=64, tp=tp, pp=pp, ep=ep,
        zero=zero, sp=sp and tp > 1, recompute=recompute,
        dp_replicate=1 if zero else dp, dp_shard=dp if zero else 1,
    )  # fmt: skip
    result = estimate(plan)
    options = Options.of(plan.phase, plan.workload)
    bound = bound_layouts(plan.model, plan.cluster, plan.workload, Layouts.of(plan.phase), options)
    assert bound.time_s[0] <= result.step_s.median * (1 + 1e-9)
    assert bound.memory_bytes[0] <= result.peak_memory_bytes.median * (1 + 1e-9)


def test_experts_held_once_exchange_no_gradients(make_plan: MakePlan) -> None:
    """With ep over all ranks only the dense parameters are shared; with adapters, only these."""
    plan = make_plan("mixtral-8x7b", dp_shard=8, ep=8, zero=1, seq_tokens=SEQ, global_batch_seqs=8)
    pool = plan.cluster.pools[0]
    dense = plan.model.num_params - 32 * EXPERTS * 3 * H * FFN
    for sharding in ("fsdp", "megatron"):
        stack = msgspec.structs.replace(pool.stack, sharding=sharding, reduce_bytes=4.0)
        pools = (msgspec.structs.replace(pool, stack=stack),)
        cluster = msgspec.structs.replace(plan.cluster, pools=pools)
        wire = estimate(msgspec.structs.replace(plan, cluster=cluster)).bytes_on_wire
        assert wire["reduce_scatter@dp"] == pytest.approx(4 * dense, rel=1e-9)


def test_frozen_experts_have_neither_gradients_nor_an_update(make_plan: MakePlan) -> None:
    plan = make_plan("mixtral-8x7b", dp_shard=8, zero=1, seq_tokens=SEQ, global_batch_seqs=8)
    (setting,) = plan.phase.settings
    named = {**setting.techniques, "lora": {"rank": 8, "targets": "qv"}}
    phase = msgspec.structs.replace(
        plan.phase, settings=(msgspec.structs.replace(setting, techniques=named),)
    )
    adapters = 32 * 8 * ((H + HEADS * HEAD) + (H + KV * HEAD))
    result = estimate(msgspec.structs.replace(plan, phases=(phase,)))
    assert result.bytes_on_wire["reduce_scatter@dp"] == pytest.approx(4 * adapters, rel=1e-9)
    assert result.time_terms_s["optimizer"] < estimate(plan).time_terms_s["optimizer"] / 100


def counted_graph(**degrees: int) -> tuple[Graph, Sizes]:
    """A Mixtral layer as our executors run it."""
    model, options = load_model("mixtral-8x7b"), Options(compute="bf16")
    sp = bool(degrees.get("sequence_parallel", 0))
    graph = decoder_layer(model, model.layers[0], sequence_parallel=sp, fused=True,
                          options=options, counted=True)  # fmt: skip
    sizes = local_sizes(model, model.layers[0], layouts_of(**degrees), SEQ)
    return apply(graph, options), sizes


def test_counts_go_first_and_rows_are_gathered_evenly_or_not() -> None:
    """Of 8 experts 8 bytes each; uneven rows over tp by all-to-all, even ones by a gather."""
    graph, sizes = counted_graph(ep=4)
    counts, rows = moved(graph, "ep")[:2]
    assert num_bytes([counts], sizes) == EXPERTS * 8
    assert num_bytes([rows], sizes) == SEQ * TOP_K * H * 2
    for ep, even in ((1, True), (4, False)):
        graph, sizes = counted_graph(ep=ep, tp=2, sequence_parallel=1)
        wire = wire_bytes(forward_collectives(graph, Options(compute="bf16"), PRICES), sizes,
                          layouts_of(ep=ep, tp=2, sequence_parallel=1))  # fmt: skip
        # counts of both tp ranks, and the inputs of attention, which are gathered as well
        small = 2 * EXPERTS * 8
        gathered = float(wire["all_gather@tp"][0]) - SEQ * H * 2 - small
        assert gathered == (SEQ * TOP_K * H * 2 if even else 0)
        assert float(wire.get("all_to_all@tp", np.zeros(1))[0]) == (
            0 if even else 2 * SEQ * TOP_K * H * 2
        )


def _with_placement(plan: Plan, **setting: Any) -> Plan:
    (own,) = plan.phase.settings
    techniques = {**own.techniques, "expert-placement": setting}
    settings = (msgspec.structs.replace(own, techniques=techniques),)
    return msgspec.structs.replace(
        plan, phases=(msgspec.structs.replace(plan.phase, settings=settings),)
    )


SLOTS = [[0, 1, 2], [3, 4, 0], [5, 6, 1], [7, 0, 1]]
"""Experts 0 and 1 three times each."""


def test_replicas_take_memory_and_an_exchange_of_gradients(make_plan: MakePlan) -> None:
    plan = make_plan("mixtral-8x7b", dp_shard=8, ep=4, zero=1, seq_tokens=SEQ, global_batch_seqs=8)
    placed = _with_placement(plan, slots=SLOTS)
    before, after = estimate(plan), estimate(placed)
    one, layers = 3 * H * FFN, 32
    more_rows = after.bytes_on_wire["all_to_all@ep"] - before.bytes_on_wire["all_to_all@ep"]
    counts = layers * (12 - 8) * 8
    shards, ep = 2, 4
    assert more_rows - counts == layers * 2 * 4 * one * 4 / ep / shards
    ratio = after.memory_terms_bytes["optimizer"] / before.memory_terms_bytes["optimizer"]
    assert 1.4 < ratio < 1.5, "three experts on a rank instead of two, and the dense weights"


def test_imbalance_costs_time_and_memory_but_no_bytes(make_plan: MakePlan) -> None:
    plan = make_plan("mixtral-8x7b", dp_shard=8, ep=8, zero=1, seq_tokens=SEQ, global_batch_seqs=8)
    even, uneven = (estimate(_with_placement(plan, imbalance=x)) for x in (1.0, 2.0))
    assert even.bytes_on_wire == uneven.bytes_on_wire == estimate(plan).bytes_on_wire
    assert uneven.time_terms_s["exposed.ep"] > 1.9 * even.time_terms_s["exposed.ep"]
    assert uneven.time_terms_s["forward"] > even.time_terms_s["forward"]
    assert uneven.peak_memory_bytes.median > even.peak_memory_bytes.median
    alone = make_plan("mixtral-8x7b", dp_shard=8, zero=3, seq_tokens=SEQ, global_batch_seqs=8)
    assert estimate(_with_placement(alone, imbalance=1.0)) == estimate(alone)


@pytest.mark.parametrize(("kind", "ranks"), [("micro-batch", 2), ("global-batch", 8)])
def test_a_balance_loss_sums_four_bytes_per_expert(
    make_plan: MakePlan, kind: Any, ranks: int
) -> None:
    """Over the parts of a sequence, or over all replicas' too; not again in a recomputed layer."""
    plan = make_plan("mixtral-8x7b", dp_replicate=4, tp=2, sp=True, seq_tokens=SEQ,
                     global_batch_seqs=8, recompute="full")  # fmt: skip
    workload = msgspec.structs.replace(plan.workload, balance_loss=kind)
    with_loss = estimate(msgspec.structs.replace(plan, workload=workload))
    assert with_loss.bytes_on_wire["all_reduce@ep"] == 2 * 32 * EXPERTS * 4
    layouts = Layouts.of(plan.phase)
    sizes = local_sizes(plan.model, plan.model.layers[0], layouts, SEQ)
    axis = "micro_batch_ranks" if kind == "micro-batch" else "batch_ranks"
    assert sizes[axis][0] == ranks


def test_capacity_is_a_whole_number_of_rows() -> None:
    """Of 8 experts, 1.1 x 2 x 100 / 8 = 27.5 rows each: 28."""
    experts = load_model("mixtral-8x7b").layers[0].experts
    assert experts is not None
    full = msgspec.structs.replace(experts, capacity_factor=1.1)
    assert full.capacity(100) == 28
    layer = msgspec.structs.replace(load_model("mixtral-8x7b").layers[0], experts=full)
    sizes = local_sizes(load_model("mixtral-8x7b"), layer, layouts_of(), 100)
    assert sizes["copies"][0] * 100 == pytest.approx(8 * 28)


def test_moments_on_the_host_leave_the_device(make_plan: MakePlan) -> None:
    plan = make_plan("mixtral-8x7b", dp_shard=8, ep=8, zero=1, seq_tokens=SEQ, global_batch_seqs=8)
    (setting,) = plan.phase.settings
    hosted = with_techniques(plan, setting.techniques | {"offload": {"states": "experts"}})
    every = with_techniques(plan, setting.techniques | {"offload": {"states": "optimizer"}})
    before, after = estimate(plan), estimate(hosted)
    rate = StateBytes.of(plan.cluster.pools[0].stack, Options.of(plan.phase)).optimizer
    moments = rate * 32 * 3 * H * FFN  # of one expert per layer
    saved = before.memory_terms_bytes["optimizer"] - after.memory_terms_bytes["optimizer"]
    assert saved == after.bytes_off_device["host"] == moments
    assert after.bytes_copied == {"in@host": moments, "out@host": moments}
    assert estimate(every).bytes_off_device["host"] > moments
    link = plan.cluster.pools[0].host
    assert link is not None
    once_s, update_s = moments / link.bytes_per_s, before.time_terms_s["optimizer"]
    exposed_s = after.time_terms_s["exposed.copy"]
    assert once_s - update_s <= exposed_s <= 2 * once_s  # copies run beside one another, and it


def with_techniques(plan: Plan, techniques: dict[str, dict[str, Any]]) -> Plan:
    layers = (0, plan.model.num_layers - 1)
    phase = msgspec.structs.replace(
        plan.phase, settings=(Setting(layers=layers, techniques=techniques),)
    )
    return msgspec.structs.replace(plan, phases=(phase,))


def test_routers_are_summed_over_tp_without_a_split_sequence(make_plan: MakePlan) -> None:
    """Each rank sees its part of the experts' outputs, so that a router's gradient is a part."""
    plan = make_plan("mixtral-8x7b", dp_replicate=4, tp=2, seq_tokens=SEQ, global_batch_seqs=4)
    dense = make_plan("llama-2-7b", dp_replicate=4, tp=2, seq_tokens=SEQ, global_batch_seqs=4)
    wire, plain = estimate(plan).bytes_on_wire, estimate(dense).bytes_on_wire
    edges = (4 * 32 + 2) * SEQ * H * 2
    assert wire["all_reduce@tp"] - plain["all_reduce@tp"] == 32 * EXPERTS * H * 4
    assert plain["all_reduce@tp"] >= edges
