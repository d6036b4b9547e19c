"""Offload in the cost model: the ledger, copies, what lies off the device, and MEMO's figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.costmodel import bound_layouts, estimate
from forerun.costmodel.copies import BUCKET_ELEMENTS, returns_at_once
from forerun.costmodel.graph import Graph, Sizes, volume
from forerun.costmodel.layers import decoder_layer
from forerun.costmodel.layout import Layouts, local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import apply, local_axes, offload
from forerun.errors import InputError
from forerun.estimate import Estimate
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, even_stages
from forerun.planner.activations import token_fraction

from .graphs import layouts_of

MakePlan = Callable[..., Plan]

GPT_7B = Model(
    name="gpt-7b",
    hidden=4096,
    vocab=50257,
    layers=(
        Layer(repeat=32, heads=32, kv_heads=32, head_dim=128, ffn_hidden=16384, mlp="gelu",
              norm="layernorm"),
    ),
    positions="none",
)  # fmt: skip
"""The block that MEMO counts with: 16 hidden tensors saved (arXiv 2407.12117, figure 4)."""
TP, K = 8, 1024


def block(seq: int, **more: Any) -> tuple[Graph, Sizes, Options]:
    options = Options(compute="bf16", **more)
    layer = GPT_7B.layers[0]
    graph = decoder_layer(GPT_7B, layer, sequence_parallel=False, fused=True, options=options)
    sizes = local_axes(local_sizes(GPT_7B, layer, layouts_of(), seq), options)
    return apply(graph, options), sizes, options


def parted(seq: int, **more: Any) -> offload.Parted:
    graph, sizes, options = block(seq, **more)
    return offload.part(graph, sizes, liveness(graph, sizes), options)


def forward_s(seq: int) -> tuple[float, float]:
    """Seconds of matmuls and of attention on one of 8 GPUs, at the efficiencies that the check
    assumes: 312 TFLOP/s, 60 % in matmuls, 55 % in attention."""
    graph, sizes, _ = block(seq)
    seconds = [0.0, 0.0]
    for op in graph.operators:
        if op.kind in ("linear", "attention"):
            flops = KINDS[op.kind].forward_flops([volume(a, sizes) for a in op.price_axes])
            rate = 312e12 * (0.55 if op.kind == "attention" else 0.60)
            seconds[op.kind == "attention"] += float(flops[0]) / TP / rate
    return seconds[0], seconds[1]


@pytest.mark.parametrize(
    ("seq", "layer_bytes", "share", "bytes_per_s"),
    [
        (64 * K, 1.07e9, 0.59, 25e9),
        (192 * K, 3.22e9, 0.81, 11.3e9),
        (512 * K, 8.59e9, 0.92, 4.8e9),
        (1024 * K, 17.2e9, 0.96, 2.5e9),
    ],
)
def test_matches_memo_overlap(
    seq: int, layer_bytes: float, share: float, bytes_per_s: float
) -> None:
    """Bytes of a layer on one of 8 GPUs, attention's share of its forward, and the rate at which
    all of it moves beside that: full overlap is published from 192 K tokens on."""
    moved = float(parted(seq, offload=1.0).moved[0]) / TP
    matmuls, attention = forward_s(seq)
    assert moved == pytest.approx(layer_bytes, rel=0.01)
    assert attention / (matmuls + attention) == pytest.approx(share, abs=0.005)
    assert moved / (matmuls + attention) == pytest.approx(bytes_per_s, rel=0.02)


def test_matches_memo_attention_share_beyond_576k() -> None:
    matmuls, attention = forward_s(576 * K)
    assert attention / (matmuls + attention) > 0.9


def test_matches_memo_fraction_that_the_host_holds() -> None:
    """0.41 of a million tokens in 2 TB, by the published programme and by our ledger."""
    seq, layers, host_bytes = 1024 * K, 30, 2e12 / TP
    unit = seq * 4096 * 2 / TP
    found = token_fraction(2 * unit, 14 * unit, window_s=1e9, copy_bytes_per_s=1e9,
                           swapped_layers=layers, host_bytes=host_bytes)  # fmt: skip
    assert found == pytest.approx(0.41, abs=0.005)
    taken = [
        layers * float(parted(seq, offload=a, offload_rest="recompute").moved[0]) / TP
        for a in (0.40, 0.42)
    ]
    assert taken[0] < host_bytes < taken[1]


@given(fraction=st.floats(0, 1), seq=st.sampled_from([128, 1000, 4096]))
@settings(max_examples=25)
def test_tokens_move_whole_inputs_and_a_share_of_the_rest(fraction: float, seq: int) -> None:
    """A + a (S - A) bytes with a = floor(alpha s) / s; nothing stays."""
    graph, sizes, options = block(seq, offload=fraction, offload_rest="recompute")
    live = liveness(graph, sizes)
    found = offload.part(graph, sizes, live, options)
    hidden, statistics = seq * 4096 * 2, seq * 32 * 4
    whole = 2 * hidden + statistics
    share = np.floor(fraction * seq) / seq
    assert found.moved[0] == pytest.approx(whole + share * (float(live.saved[0]) - whole))
    assert found.stays[0] == 0 and found.lands[0] == live.saved[0]
    again = {op.name for op in graph.operators if op.recomputed and op.kind != "edge"}
    assert again == {
        "attention_norm", "wq", "wk", "wv", "wo", "attention_residual", "mlp_norm", "up", "gelu",
    }  # fmt: skip


def with_offload(plan: Plan, spared: int = 0, **chosen: Any) -> Plan:
    """The plan with offload in all layers but the last ones."""
    (setting,) = plan.phase.settings
    last = setting.layers[1]
    techniques = setting.techniques | {"offload": chosen}
    parts = [Setting(layers=(0, last - spared), techniques=techniques)]
    if spared:
        parts.append(Setting(layers=(last - spared + 1, last), techniques=setting.techniques))
    phase = msgspec.structs.replace(plan.phase, settings=tuple(parts))
    return msgspec.structs.replace(plan, phases=(phase,))


def with_pool(plan: Plan, **changes: Any) -> Plan:
    pool = msgspec.structs.replace(plan.cluster.pools[0], **changes)
    cluster = msgspec.structs.replace(plan.cluster, pools=(pool,))
    return msgspec.structs.replace(plan, cluster=cluster)


def working_bytes(found: Estimate) -> float:
    terms = found.memory_terms_bytes
    return terms["activations"] + terms["workspace"]


def test_more_offload_keeps_less_and_moves_more(make_plan: MakePlan) -> None:
    plan = make_plan("llama-2-7b", dp_shard=8, zero=3, seq_tokens=4096, global_batch_seqs=8)
    found = [estimate(with_offload(plan, 2, activations=a)) for a in (0.0, 0.25, 0.5, 0.75, 1.0)]
    kept = [working_bytes(e) for e in found]
    moved = [e.bytes_copied.get("out@host", 0.0) for e in found]
    steps = [e.step_s.median for e in found]
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.35 * kept[0]
    assert moved == sorted(moved) and steps == sorted(steps)
    assert found[-1].bytes_off_device["host"] == moved[-1]


def test_the_last_layers_are_not_worth_moving(make_plan: MakePlan) -> None:
    """Sparing the last two takes no more memory where everything else moves, and less time."""
    plan = make_plan("llama-2-7b", dp_shard=8, zero=3, seq_tokens=8192, global_batch_seqs=8)
    every = estimate(with_offload(plan, activations=1.0))
    spared = estimate(with_offload(plan, 2, activations=1.0))
    assert spared.step_s.median < every.step_s.median
    assert working_bytes(spared) <= 1.1 * working_bytes(every)


def test_what_the_host_lacks_does_not_fit(make_plan: MakePlan) -> None:
    plan = with_offload(make_plan("llama-2-7b", dp_shard=8, zero=3, global_batch_seqs=8), 2,
                        activations=1.0)  # fmt: skip
    needed = int(8 * estimate(plan).bytes_off_device["host"])
    assert estimate(with_pool(plan, host_memory_bytes=needed)).fits == "yes"
    assert estimate(with_pool(plan, host_memory_bytes=needed - 8)).fits == "no"


def test_optimiser_states_wait_elsewhere_and_visit(make_plan: MakePlan) -> None:
    plan = make_plan("llama-2-7b", dp_shard=8, zero=3, seq_tokens=2048, global_batch_seqs=8)
    here, away = estimate(plan), estimate(with_offload(plan, states="optimizer"))
    states = here.memory_terms_bytes["optimizer"]
    assert away.memory_terms_bytes["optimizer"] == 0
    assert away.bytes_copied == {"in@host": states, "out@host": states}
    assert away.bytes_off_device == {"host": states}
    assert away.time_terms_s["exposed.copy"] > 0
    assert states > 8 * 2 * BUCKET_ELEMENTS
    every = estimate(with_offload(plan, states="parameters"))
    assert every.memory_terms_bytes["parameters"] == 0
    assert every.bytes_off_device["host"] == 2 * states  # 4 + 4 bytes beside the moments' 8
    assert every.bytes_copied == {"in@host": states, "out@host": states / 2}  # 2 gathers, 1 scatter


def test_a_tier_without_a_link_is_refused(make_plan: MakePlan) -> None:
    plan = with_offload(make_plan(dp_shard=8, zero=3), activations=0.5, tier="disk")
    with pytest.raises(InputError, match=r"offload.tier=disk: .* has no disk link"):
        estimate(plan)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"activations": 1.5}, "offload.activations=1.5"),
        ({"activations": -0.1}, "offload.activations=-0.1"),
        ({"activations": 0.5, "rest": "drop"}, "offload.rest=drop"),
        ({"activations": 0.5, "tier": "tape"}, "offload.tier=tape"),
        ({"states": "gradients"}, "offload.states=gradients"),
        ({"states": "parameters", "tier": "disk"}, "offload.tier=disk: FSDP"),
    ],
)
def test_unknown_settings(make_plan: MakePlan, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimate(with_offload(make_plan(dp_shard=8, zero=3), **chosen))


def test_tokens_and_recompute_exclude_one_another(make_plan: MakePlan) -> None:
    plan = make_plan(dp_shard=8, zero=3, recompute="full")
    with pytest.raises(InputError, match=r"offload.rest=recompute: recompute=full"):
        estimate(with_offload(plan, activations=0.5, rest="recompute"))


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp", "expected"),
    [("1f1b", 1, 1, 8), ("1f1b", 4, 1, 8), ("gpipe", 4, 1, 0), ("interleaved", 2, 2, 8),
     ("zb-h1", 4, 1, 8), ("zb-v", 2, 2, 8)],
)  # fmt: skip
def test_micro_batches_that_return_at_once(
    make_plan: MakePlan, schedule: str, pp: int, vpp: int, expected: int
) -> None:
    from forerun.mesh import Mesh

    phase = Phase(
        steps=1, seq_tokens=8, micro_batch_seqs=1, num_microbatches=8, mesh=Mesh(pp=pp, vpp=vpp),
        schedule=schedule,  # pyright: ignore[reportArgumentType]
        stages=even_stages(pp * vpp, pp * vpp, "any"),
    )  # fmt: skip
    assert returns_at_once(phase) == expected


@given(
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
    rest=st.sampled_from(["keep", "recompute"]),
    states=st.sampled_from([None, "optimizer"]),
    spared=st.sampled_from([0, 2]),
    degrees=st.sampled_from(
        [
            {"tp": 8},
            {"tp": 2, "pp": 4},
            {"dp_shard": 8},
            {"pp": 8},
            {"pp": 8, "schedule": "zb-h1"},
            {"tp": 2, "pp": 4, "vpp": 2, "schedule": "zb-v"},
        ]
    ),
    seq=st.sampled_from([1024, 16384]),
)
@settings(max_examples=12)
def test_bound_never_exceeds_the_simulator(
    make_plan: MakePlan, fraction: float, rest: str, states: str | None, spared: int,
    degrees: dict[str, Any], seq: int,
) -> None:  # fmt: skip
    """Of a plan that offloads in all layers, and of one that spares the last ones."""
    zero = 3 if "dp_shard" in degrees else 0
    plan = make_plan("llama-2-7b", seq_tokens=seq, global_batch_seqs=16, zero=zero, **degrees)
    chosen = {"activations": fraction, "rest": rest} | ({"states": states} if states else {})
    plan = with_offload(plan, spared, **chosen)
    policies = [Options.of(plan.phase, plan.workload)]
    if spared:
        policies.append(Options.of(plan.phase, plan.workload, 31))
    result = estimate(plan)
    bound = bound_layouts(
        plan.model, plan.cluster, plan.workload, Layouts.of(plan.phase), policies, capacity_bytes=
        result.peak_memory_bytes.median,
    )  # fmt: skip
    assert 0 < bound.time_s[0] <= result.step_s.median * (1 + 1e-9)
    assert 0 < bound.memory_bytes[0] <= result.peak_memory_bytes.median * (1 + 1e-9)
