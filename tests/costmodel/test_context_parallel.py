"""Context parallelism: the attention core's work, what is sent, and what of it is hidden."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster, load_model
from forerun.cluster import Cluster
from forerun.costmodel import Layouts, bound_layouts, estimate
from forerun.costmodel.exposed import HIDDEN_SHARE, wire_bytes
from forerun.costmodel.graph import volume
from forerun.costmodel.layout import local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.operator_times import operator_times
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.costmodel.priced_pieces import pieces
from forerun.costmodel.prices import Prices
from forerun.errors import InputError
from forerun.layout_rules import layout_problems
from forerun.mesh import Mesh
from forerun.plan import Plan, Setting

from .graphs import layer_graph, layouts_of, moved, num_bytes

MakePlan = Callable[..., Plan]

SEQ, MODEL = 8192, "llama-3.1-8b"


def _core_work(cp_kind: str = "zigzag", **degrees: int) -> float:
    graph, sizes = layer_graph(MODEL, SEQ, cp_kind=cp_kind, **degrees)
    op = next(op for op in graph.operators if op.kind == "attention")
    return float(KINDS["attention"].work([volume(axes, sizes) for axes in op.price_axes])[0])


def test_one_rank_is_priced_by_heads_sequence_and_head_size() -> None:
    graph, sizes = layer_graph(MODEL, SEQ, tp=2, micro_batch_seqs=3)
    op = next(op for op in graph.operators if op.kind == "attention")
    shape = [float(volume(axes, sizes)[0]) for axes in op.price_axes]
    assert shape == [3 * 32 / 2, SEQ, 128]


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_balanced_ranks_share_the_causal_square(cp: int) -> None:
    assert _core_work(cp=cp) == _core_work() / cp
    assert _core_work("ulysses", cp=cp, ulysses=cp) == _core_work() / cp
    assert _core_work(cp=cp, ulysses=2) == _core_work() / cp


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_contiguous_blocks_leave_the_last_rank_the_most(cp: int) -> None:
    """2 - 1/cp times the balanced share: its own block, and a full square with all others."""
    assert _core_work("ring", cp=cp) == pytest.approx((2 - 1 / cp) * _core_work(cp=cp))
    assert _core_work("ring") == _core_work()


def test_bytes_sent_by_ulysses() -> None:
    """7/8 of Q, K, V and O of 1,024 local tokens: 18,350,080 per layer and direction."""
    graph, sizes = layer_graph(MODEL, SEQ, cp=8, ulysses=8, cp_kind="ulysses")
    for direction in ("forward", "backward"):
        exchanged = moved(graph, "ulysses", direction)
        assert [c.kind for c in exchanged] == ["all_to_all"] * 4
        assert num_bytes(exchanged, sizes) * 7 / 8 == 18_350_080


def test_ulysses_repeats_keys_and_values_where_heads_are_few() -> None:
    graph, sizes = layer_graph(MODEL, SEQ, cp=16, ulysses=16)
    sent = num_bytes(moved(graph, "ulysses"), sizes)
    assert sent == (SEQ / 16) * 128 * 2 * (2 * 32 + 2 * 16)


def test_bytes_sent_around_the_ring() -> None:
    """Seven eighths of K and V of the whole sequence: 29,360,128 per layer, forward."""
    graph, sizes = layer_graph(MODEL, SEQ, cp=8)
    layouts = layouts_of(cp=8)
    there = wire_bytes(moved(graph, "ring"), sizes, layouts)
    assert there == {"send@cp": 29_360_128}
    back = wire_bytes(moved(graph, "ring", "backward"), sizes, layouts)
    assert back == {"send@cp": 2 * 29_360_128}  # keys and values again, and their gradients


def test_contiguous_blocks_are_not_sent_where_nobody_looks_at_them() -> None:
    """28 of the 56 transfers of eight ranks: blocks stop at the last rank."""
    graph, sizes = layer_graph(MODEL, SEQ, cp=8, cp_kind="ring")
    there = wire_bytes(moved(graph, "ring"), sizes, layouts_of(cp=8))
    one_transfer = (SEQ // 8) * 2 * 8 * 128 * 2
    assert there == {"send@cp": 28 * one_transfer / 8}


def test_bytes_sent_by_lightseq() -> None:
    """Of eight ranks together 22 transfers of keys and values, and 6 of queries and outputs."""
    graph, sizes = layer_graph(MODEL, SEQ, cp=8, cp_kind="lightseq")
    tokens = SEQ // 8
    keys, queries, statistics = tokens * 2 * 8 * 128 * 2, tokens * 32 * 128 * 2, tokens * 32 * 4
    there = wire_bytes(moved(graph, "ring"), sizes, layouts_of(cp=8))
    assert there["send@cp"] * 8 == 22 * keys + 6 * (2 * queries + statistics)
    back = wire_bytes(moved(graph, "ring", "backward"), sizes, layouts_of(cp=8))
    assert back["send@cp"] * 8 == 22 * 2 * keys + 6 * (4 * queries + statistics)


@pytest.mark.parametrize("ring", [2, 4, 6, 8, 16])
def test_lightseq_is_what_its_schedule_does(ring: int) -> None:
    """Transfers counted step by step; makespan P/2 + 1/2 of P/2: efficiency P / (P + 1)."""
    sizes = local_sizes(
        load_model(MODEL), load_model(MODEL).layers[0], layouts_of(cp=ring), ring * 1024
    )
    half = ring // 2
    pairs = [(r, t) for t in range(1, half + 1) for r in range(ring)]
    keys = sum(r >= t for r, t in pairs)
    queries = sum(r < t < half for r, t in pairs)
    assert sizes["lightseq_keys"] * ring == keys
    assert sizes["lightseq_queries"] * ring == queries
    squares = float(sizes["lightseq_squares"][0])
    assert squares / 2 == half + 0.5
    assert float(sizes["zigzag_squares"][0]) / squares == ring / (ring + 1)
    assert (keys, queries) == {2: (1, 0), 4: (5, 1), 6: (12, 3), 8: (22, 6), 16: (92, 28)}[ring]


def test_saved_activations_shrink_with_cp() -> None:
    whole = float(liveness(*layer_graph(MODEL, SEQ)).saved[0])
    assert float(liveness(*layer_graph(MODEL, SEQ, cp=8)).saved[0]) == whole / 8
    # ulysses keeps the core's output twice: in its own layout and as the projection's input
    twice = whole + SEQ * 4096 * 2
    assert float(liveness(*layer_graph(MODEL, SEQ, cp=8, ulysses=8)).saved[0]) == twice / 8


def _slowed(cluster: Cluster, factor: float) -> Cluster:
    pool = cluster.pools[0]
    link = msgspec.structs.replace(
        pool.intra_node, bytes_per_s=pool.intra_node.bytes_per_s / factor
    )
    return msgspec.structs.replace(cluster, pools=(msgspec.structs.replace(pool, intra_node=link),))


def _exposed(slower: float) -> tuple[float, float, float]:
    """Exposed time of one layer's forward, its ring's time, and its core's time."""
    model, cluster = load_model(MODEL), _slowed(load_cluster("8xH100"), slower)
    prices, layouts = Prices(cluster.pools[0], None), layouts_of(cp=8)
    options = Options(compute="bf16")
    piece = pieces(model, layouts, SEQ, prices, options).layers[0]
    graph, sizes = layer_graph(model, SEQ, cp=8)
    core = next(op for op in graph.operators if op.kind == "attention")
    core_s = operator_times(graph, sizes, layouts, prices, options).beside_forward[core.name]
    (kv,) = moved(graph, "ring")
    ranks, one = np.array([8.0]), np.ones(1)
    ring_s = prices.collective("all_gather", 8 * kv.buffer.num_bytes(sizes), ranks, one, one)
    return float(piece.comm_forward_s["cp"][0]), float(ring_s[0]), float(core_s[0])


def test_the_ring_hides_behind_a_part_of_the_core() -> None:
    exposed, ring_s, core_s = _exposed(slower=100)
    assert exposed == pytest.approx(ring_s - HIDDEN_SHARE * core_s) and exposed > 0
    exposed, ring_s, core_s = _exposed(slower=0.001)
    assert ring_s > 0 and (exposed == 0) == (ring_s <= HIDDEN_SHARE * core_s)


def test_a_ring_adds_up_partial_results() -> None:
    """Each block after the first: 10 bytes per element of the output, 4096 local tokens of 4096."""
    prices, options = Prices(load_cluster("8xH100").pools[0], None), Options(compute="bf16")

    def forward_s(seq: int, *, cp: int = 1, ulysses: int = 1) -> float:
        graph, sizes = layer_graph(MODEL, seq, cp=cp, ulysses=ulysses)
        layouts = layouts_of(cp=cp, ulysses=ulysses)
        times = operator_times(graph, sizes, layouts, prices, options)
        return float(times.beside_forward["attention_core"][0])

    stack = prices.pool.stack
    merged_s = 10 * 4096 * 4096 / prices.memory_bytes_per_s * stack.elementwise_multiplier
    alone, ring = forward_s(SEQ) / 2, forward_s(SEQ, cp=2)
    assert ring - alone == pytest.approx(merged_s + stack.ring_step_s, rel=0.02)
    assert forward_s(SEQ, cp=2, ulysses=2) == pytest.approx(alone, rel=0.02)
    # the longer the sequence, the less of the core it is
    long, short = 16 * SEQ, SEQ
    assert forward_s(long, cp=8) / (forward_s(long) / 8) < 1.15
    assert forward_s(short, cp=8) / (forward_s(short) / 8) > 1.3


@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        (Mesh(cp=8), []),
        (Mesh(cp=8, ulysses=8), []),
        (Mesh(cp=16, ulysses=16), []),  # eight key-value heads, each twice
        (Mesh(cp=12, ulysses=12), ["cp", "ulysses", "ulysses"]),
        (Mesh(cp=16, ulysses=8, tp=8), ["ulysses"]),  # 64 ranks want a head, there are 32
    ],
)
def test_layout_rules(mesh: Mesh, fields: list[str]) -> None:
    problems = layout_problems(
        load_model(MODEL), mesh, seq_tokens=SEQ, zero=0, sequence_parallel=False,
        schedule="1f1b", num_microbatches=1,
    )  # fmt: skip
    assert [problem.field for problem in problems] == fields


def _with_kind(plan: Plan, kind: str) -> Plan:
    phase, setting = plan.phase, plan.phase.settings[0]
    named = {**setting.techniques, "context-parallel": {"kind": kind}}
    settings = (Setting(layers=setting.layers, techniques=named),)
    return msgspec.structs.replace(
        plan, phases=(msgspec.structs.replace(phase, settings=settings),)
    )


def test_kinds_are_checked_and_change_the_time(make_plan: MakePlan) -> None:
    plan = make_plan(cp=8, seq_tokens=65536, global_batch_seqs=1)
    balanced, blocks = estimate(plan), estimate(_with_kind(plan, "ring"))
    assert balanced.step_s.median < blocks.step_s.median
    with pytest.raises(InputError, match=r"^cp-kind=spiral"):
        estimate(_with_kind(plan, "spiral"))
    with pytest.raises(InputError, match=r"^cp-kind=ulysses"):
        estimate(_with_kind(plan, "ulysses"))
    exchanged = make_plan(cp=8, ulysses=8, seq_tokens=65536, global_batch_seqs=1)
    result = estimate(_with_kind(exchanged, "ulysses"))
    assert "all_to_all@cp" in result.bytes_on_wire and "send@cp" not in result.bytes_on_wire
    assert result.time_terms_s["exposed.cp"] > 0


@given(
    cp=st.sampled_from([1, 2, 4]), ulysses=st.sampled_from([1, 2, 4]), tp=st.sampled_from([1, 2]),
    zero=st.sampled_from([0, 3]), kind=st.sampled_from(["zigzag", "ring", "lightseq"]),
)  # fmt: skip
@settings(max_examples=20)
def test_bound_never_exceeds_the_simulator(
    make_plan: MakePlan, cp: int, ulysses: int, tp: int, zero: int, kind: str
) -> None:
    dp = 8 // (cp * tp)
    plan = make_plan(
        seq_tokens=SEQ, global_batch_seqs=8, cp=cp, ulysses=min(ulysses, cp), tp=tp, zero=zero,
        dp_replicate=1 if zero else dp, dp_shard=dp if zero else 1,
    )  # fmt: skip
    plan = _with_kind(plan, kind)
    result = estimate(plan)
    options = Options.of(plan.phase, plan.workload)
    bound = bound_layouts(plan.model, plan.cluster, plan.workload, Layouts.of(plan.phase), options)
    assert bound.time_s[0] <= result.step_s.median * (1 + 1e-9)
    assert bound.memory_bytes[0] <= result.peak_memory_bytes.median * (1 + 1e-9)
