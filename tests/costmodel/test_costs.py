"""The graph's FLOPs, bytes and collectives against exact arithmetic, and laws that must hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_model
from forerun.cluster import Cluster
from forerun.costmodel import Layouts, bound_layouts, estimate
from forerun.costmodel.graph import volume
from forerun.costmodel.layers import decoder_layer
from forerun.costmodel.layout import local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import apply
from forerun.estimate import MEMORY_TERMS, TIME_TERMS
from forerun.plan import Plan

MakePlan = Callable[..., Plan]


def _layer_graph(name: str, tp: int, seq: int, *, recompute: str = "none", sp: bool = False):
    model = load_model(name)
    one = np.array([1])
    layouts = Layouts(
        micro_batch_seqs=one, num_microbatches=one, dp_replicate=one, dp_shard=one, tp=one * tp,
        pp=one, vpp=one, zero=one * 0, sequence_parallel=one * int(sp), schedule=one,
        cp=one, ulysses=one, ep=one,
    )  # fmt: skip
    options = Options(compute="bf16", recompute=recompute)
    graph = decoder_layer(model, model.layers[0], sequence_parallel=sp, fused=True, options=options)
    sizes = local_sizes(model, model.layers[0], layouts, seq)
    return apply(graph, options), sizes


def test_matmul_flops_of_a_llama_8b_layer() -> None:
    """4*4096*4096 + 4*4096*1024 + 6*4096*14336 per token, forward."""
    graph, sizes = _layer_graph("llama-3.1-8b", 1, 8192)
    flops = sum(
        float(KINDS["linear"].forward_flops([volume(a, sizes) for a in op.price_axes])[0])
        for op in graph.operators
        if op.kind == "linear"
    )
    assert flops / 8192 == 436_207_616


def test_causal_attention_flops_of_a_llama_8b_layer() -> None:
    """2 * s * a * d per token at 8192 tokens."""
    graph, sizes = _layer_graph("llama-3.1-8b", 1, 8192)
    op = next(op for op in graph.operators if op.kind == "attention")
    shape = [volume(a, sizes) for a in op.price_axes]
    assert float(KINDS["attention"].forward_flops(shape)[0]) / 8192 == 67_108_864


def test_saved_activations_of_a_llama_8b_layer() -> None:
    """8h + 4ad + 4gd + 4a + 6f bytes per token, + 8 for two inverse deviations, + 2f for silu."""
    graph, sizes = _layer_graph("llama-3.1-8b", 1, 8192)
    per_token = float(liveness(graph, sizes).saved[0]) / 8192
    assert per_token == 139_392 + 8 + 2 * 14336


def test_full_recompute_keeps_the_input_alone() -> None:
    graph, sizes = _layer_graph("llama-3.1-8b", 1, 8192, recompute="full")
    assert float(liveness(graph, sizes).saved[0]) == 2 * 4096 * 8192


def test_tensor_parallel_layer_moves_what_megatron_moves(make_plan: MakePlan) -> None:
    """Forward 2 + backward 2 all-reduces of s*b*h per layer; embedding 1; head 1; loss 3 x fp32."""
    plan = make_plan(tp=8, global_batch_seqs=1, compute="bf16")
    wire = estimate(plan).bytes_on_wire["all_reduce@tp"]
    hidden = 8192 * 4096 * 2
    assert wire == 32 * 4 * hidden + hidden + hidden + 3 * 8192 * 4


def test_zero3_moves_parameters_twice_and_gradients_once(make_plan: MakePlan) -> None:
    plan = make_plan(dp_shard=8, zero=3, global_batch_seqs=16)
    wire, model = estimate(plan).bytes_on_wire, plan.model
    layers = model.num_layers * model.layers[0].num_params(model.hidden)
    rest = model.num_params - layers
    assert wire["all_gather@dp"] == 2 * (2 * layers + rest) * 2  # two micro-batches, bf16
    assert wire["reduce_scatter@dp"] == 2 * model.num_params * 4


@pytest.mark.parametrize(
    "options",
    [
        {"dp_shard": 8, "zero": 3},
        {"dp_shard": 4, "tp": 2, "zero": 3, "sp": True, "recompute": "full"},
        {"dp_replicate": 2, "tp": 2, "pp": 2, "micro_batch_seqs": 2},
        {"pp": 4, "vpp": 2, "dp_shard": 2, "zero": 1, "schedule": "interleaved"},
        {"pp": 8, "schedule": "gpipe"},
    ],
)
def test_terms_sum_to_the_whole(make_plan: MakePlan, options: dict[str, int]) -> None:
    result = estimate(make_plan(**options))
    assert tuple(result.time_terms_s) == TIME_TERMS
    assert tuple(result.memory_terms_bytes) == MEMORY_TERMS
    assert sum(result.time_terms_s.values()) == pytest.approx(result.step_s.median)
    assert sum(result.memory_terms_bytes.values()) == pytest.approx(result.peak_memory_bytes.median)
    assert min(result.time_terms_s.values()) >= 0
    assert min(result.memory_terms_bytes.values()) >= 0
    assert result.step_s.low < result.step_s.median < result.step_s.high


def test_one_rank_moves_nothing(make_plan: MakePlan) -> None:
    result = estimate(make_plan(gpus="1xH100", seq_tokens=512, global_batch_seqs=2))
    assert result.bytes_on_wire == {}
    assert all(v == 0 for n, v in result.time_terms_s.items() if n.startswith("exposed"))


def _with_bandwidth(cluster: Cluster, factor: float) -> Cluster:
    pool = cluster.pools[0]
    link = msgspec.structs.replace(
        pool.intra_node, bytes_per_s=pool.intra_node.bytes_per_s * factor
    )
    return msgspec.structs.replace(cluster, pools=(msgspec.structs.replace(pool, intra_node=link),))


@given(factor=st.floats(1.0, 8.0), sp=st.booleans(), zero=st.sampled_from([0, 1, 2, 3]))
@settings(max_examples=15)
def test_more_bandwidth_is_never_slower(
    make_plan: MakePlan, factor: float, sp: bool, zero: int
) -> None:
    degrees = {"dp_shard": 4} if zero else {"dp_replicate": 4}
    plan = make_plan(tp=2, sp=sp, zero=zero, **degrees)
    faster = msgspec.structs.replace(plan, cluster=_with_bandwidth(plan.cluster, factor))
    assert estimate(faster).step_s.median <= estimate(plan).step_s.median * (1 + 1e-12)


@st.composite
def _layouts(draw: st.DrawFn) -> dict[str, int | str | bool]:
    tp = draw(st.sampled_from([1, 2, 4]))
    pp = draw(st.sampled_from([1, 2, 4]))
    dp = 16 // (tp * pp)
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved"])) if pp > 1 else "1f1b"
    zero = draw(st.sampled_from([0, 1, 2, 3])) if dp > 1 else 0
    replicate = draw(st.sampled_from([1, 2])) if zero and dp > 1 else (1 if zero else dp)
    return {
        "tp": tp,
        "pp": pp,
        "vpp": 2 if schedule == "interleaved" else 1,
        "dp_replicate": replicate,
        "dp_shard": dp // replicate if zero else 1,
        "zero": zero,
        "sp": draw(st.booleans()) if tp > 1 else False,
        "schedule": schedule,
        "micro_batch_seqs": draw(st.sampled_from([1, 2])),
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
    }


@given(options=_layouts(), model=st.sampled_from(["llama-3.1-8b", "gpt-3.6b", "llama-2-13b"]))
@settings(max_examples=40)
def test_bound_never_exceeds_the_simulator(
    make_plan: MakePlan, options: dict[str, int], model: str
) -> None:
    plan = make_plan(model, "2x8xH100", seq_tokens=2048, global_batch_seqs=128, **options)
    result, phase = estimate(plan), plan.phase
    bound = bound_layouts(
        plan.model, plan.cluster, plan.workload, Layouts.of(phase),
        Options(compute="bf16", recompute=phase.recompute),
    )  # fmt: skip
    assert bound.time_s[0] <= result.step_s.median * (1 + 1e-9)
    assert bound.memory_bytes[0] <= result.peak_memory_bytes.median * (1 + 1e-9)


@pytest.mark.parametrize(
    ("schedule", "vpp"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)]
)
def test_bound_is_close_for_equal_stages(make_plan: MakePlan, schedule: str, vpp: int) -> None:
    plan = make_plan(
        "llama-2-70b", "8x8xA100-80GB", seq_tokens=4096, global_batch_seqs=64,
        pp=4, tp=8, dp_replicate=2, vpp=vpp, schedule=schedule, recompute="full",
    )  # fmt: skip
    result = estimate(plan)
    bound = bound_layouts(
        plan.model, plan.cluster, plan.workload, Layouts.of(plan.phase),
        Options(compute="bf16", recompute="full"),
    )  # fmt: skip
    assert bound.time_s[0] >= 0.99 * result.step_s.median


def test_a_grid_gives_what_each_plan_gives(make_plan: MakePlan) -> None:
    """The arrays of a grid hold, element by element, the numbers of single layouts."""
    plans = [
        make_plan(dp_shard=8, zero=3),
        make_plan(dp_shard=4, tp=2, zero=2, sp=True),
        make_plan(dp_replicate=2, tp=4),
        make_plan(pp=2, vpp=2, dp_shard=4, zero=1, schedule="interleaved"),
    ]
    singles = [Layouts.of(plan.phase) for plan in plans]
    names = [f.name for f in dataclasses.fields(Layouts)]
    grid = Layouts(**{n: np.concatenate([getattr(s, n) for s in singles]) for n in names})
    plan = plans[0]

    def bound(layouts: Layouts):
        return bound_layouts(
            plan.model, plan.cluster, plan.workload, layouts, Options(compute="bf16")
        )

    together = bound(grid)
    for index, single in enumerate(singles):
        one = bound(single)
        assert together.time_s[index] == pytest.approx(one.time_s[0], rel=1e-12)
        assert together.memory_bytes[index] == pytest.approx(one.memory_bytes[0], rel=1e-12)
