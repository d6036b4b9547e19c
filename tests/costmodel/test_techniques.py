"""Techniques as rewrites: bytes and FLOPs of one Llama-2-7B layer by hand, and their laws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_model
from forerun.choices import RECOMPUTE_MODES
from forerun.costmodel import bound_layouts, estimate
from forerun.costmodel.graph import Graph, Operator, Sizes, volume
from forerun.costmodel.layers import decoder_layer
from forerun.costmodel.layout import Layouts, local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.costmodel.rates import is_matmul
from forerun.costmodel.techniques import apply, local_axes, offload
from forerun.errors import InputError
from forerun.plan import Plan

from .graphs import layouts_of

SEQ, HIDDEN, HEADS, FFN = 4096, 4096, 32, 11008


def rewritten(
    options: Options, model: str = "llama-2-7b", *, seq: int = SEQ, tp: int = 1, sp: bool = False
) -> tuple[Graph, Sizes]:
    """A layer under its options, with its local sizes; one sequence."""
    shape, layouts = load_model(model), layouts_of(tp=tp, sequence_parallel=int(sp))
    graph = decoder_layer(shape, shape.layers[0], sequence_parallel=sp, fused=True, options=options)
    sizes = local_sizes(shape, shape.layers[0], layouts, seq)
    return apply(graph, options), local_axes(sizes, options)


def saved_bytes(options: Options, **layout: int) -> float:
    graph, sizes = rewritten(options, **layout)  # pyright: ignore[reportArgumentType]
    return float(liveness(graph, sizes).saved[0])


def forward_flops(operators: list[Operator], sizes: Sizes) -> float:
    return sum(
        float(KINDS[op.kind].forward_flops([volume(axes, sizes) for axes in op.price_axes])[0])
        for op in operators
        if op.kind != "edge"
    )


def test_saved_bytes_without_recompute() -> None:
    """x, q, k, v, o, x1 and two norm outputs, 8 of 2h; gate, up, silu and product; statistics."""
    per_token = 16 * HIDDEN + 8 * FFN + 4 * HEADS + 2 * 4
    assert saved_bytes(Options(compute="bf16")) == per_token * SEQ


def test_selective_recompute_of_flash_attention_drops_its_statistics() -> None:
    kept = saved_bytes(Options(compute="bf16")) - saved_bytes(
        Options(compute="bf16", recompute="selective")
    )
    assert kept == 4 * HEADS * SEQ


def test_unfused_attention_saves_five_bytes_per_score() -> None:
    """Korthikanti et al. 2022, section 4.1: 5 a s^2 b beyond what flash keeps of 4 a s b."""
    flash, unfused = (saved_bytes(Options(compute="bf16", attention=k)) for k in KERNELS)
    assert unfused - flash == 5 * HEADS * SEQ**2 - 4 * HEADS * SEQ


KERNELS = ("flash", "unfused")


def test_matches_korthikanti_activations_of_gpt_175b() -> None:
    """s b h (34 + 5 a s / h) of equation 1, less two dropout masks of 1 B that we have not; norms
    keep two fp32 statistics per token each."""
    model, seq = load_model("gpt3-175b"), 2048
    options = Options(compute="fp16", attention="unfused")
    graph, sizes = rewritten(options, "gpt3-175b", seq=seq)
    h, a = model.hidden, model.layers[0].heads
    expected = seq * h * (34 - 2 + 5 * a * seq / h) + 16 * seq
    assert float(liveness(graph, sizes).saved[0]) == expected


def test_selective_recompute_of_unfused_attention_drops_the_scores() -> None:
    """What is left is what selective recompute of flash attention leaves."""
    flash, unfused = (
        saved_bytes(Options(compute="bf16", attention=kernel, recompute="selective"))
        for kernel in KERNELS
    )
    assert unfused == flash


def test_unfused_attention_computes_the_whole_square() -> None:
    """4 b s^2 h FLOPs, 13 B per score forward, 19 B backward; flash does half of the FLOPs."""
    costs: dict[str, float] = {}
    for kernel in KERNELS:
        graph, sizes = rewritten(Options(compute="bf16", attention=kernel))
        (op,) = (op for op in graph.operators if op.kind.startswith("attention"))
        costs[kernel] = forward_flops([op], sizes)
    assert costs == {"flash": 2 * SEQ**2 * HIDDEN, "unfused": 4 * SEQ**2 * HIDDEN}
    kind, shape = KINDS["attention_unfused"], [np.array([float(n)]) for n in (HEADS, SEQ, 128)]
    assert kind.forward_bytes(shape, 2.0)[0] == 13 * HEADS * SEQ**2
    assert kind.backward_bytes(shape, 2.0)[0] == 19 * HEADS * SEQ**2


def test_per_op_recompute_keeps_every_second_matmul() -> None:
    """Input, attention's output with statistics; of q, k, v, o, gate, up, down the odd ones."""
    options = Options(compute="bf16", recompute="per_op")
    q = v = o = down = x = 2 * HIDDEN
    assert saved_bytes(options) == (x + q + v + o + 4 * HEADS + 2 * FFN + down) * SEQ


def test_per_op_recompute_repeats_the_other_matmuls_and_what_lies_between() -> None:
    graph, sizes = rewritten(Options(compute="bf16", recompute="per_op"))
    again = [op for op in graph.operators if op.recomputed and op.kind != "edge"]
    assert [op.name for op in again] == [
        "attention_norm", "wk", "rope_q", "rope_k", "wo", "attention_residual",
        "mlp_norm", "up", "swiglu",
    ]  # fmt: skip
    assert forward_flops(again, sizes) == 2 * SEQ * (2 * HIDDEN**2 + HIDDEN * FFN)


def test_per_op_recompute_repeats_unfused_scores() -> None:
    graph, _ = rewritten(Options(compute="bf16", recompute="per_op", attention="unfused"))
    (op,) = (op for op in graph.operators if op.kind == "attention_unfused")
    assert op.recomputed
    assert [t.name for t in op.saves] == ["o"]


def test_full_recompute_keeps_the_input_alone() -> None:
    assert saved_bytes(Options(compute="bf16", recompute="full")) == 2 * HIDDEN * SEQ


cases = st.fixed_dictionaries(
    {
        "compute": st.sampled_from(["fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"]),
        "attention": st.sampled_from(KERNELS),
        "lora_rank": st.sampled_from([None, 16]),
    }
)
layouts = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["llama-2-7b", "llama-3.1-8b", "gpt3-175b", "nemotron4-15b"]),
        "seq": st.sampled_from([512, 4096]),
        "tp": st.sampled_from([1, 2, 8]),
    }
)


@given(case=cases, layout=layouts)
@settings(max_examples=25)
def test_more_recompute_saves_fewer_bytes(
    case: dict[str, str | int | None], layout: dict[str, int]
) -> None:
    keeps = ("full_keep_attn",) if case["attention"] != "unfused" else ()
    kept = [
        saved_bytes(Options(**case, recompute=mode), **layout)  # pyright: ignore[reportArgumentType]
        for mode in ("none", "selective", "per_op", *keeps, "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] > 0


@settings(max_examples=25)
@given(case=cases, layout=layouts, mode=st.sampled_from(RECOMPUTE_MODES))
def test_rewrites_change_no_matmul_of_the_layer(
    case: dict[str, str | int | None], layout: dict[str, int], mode: str
) -> None:
    """Recompute and precision leave all forward FLOPs; adapters only add to the linears'."""
    assume(mode != "full_keep_attn" or case["attention"] != "unfused")
    plain, sizes = rewritten(Options(compute="bf16", attention=str(case["attention"])), **layout)  # pyright: ignore[reportArgumentType]
    options = Options(**case, recompute=mode)  # pyright: ignore[reportArgumentType]
    graph, extended = rewritten(options, **layout)  # pyright: ignore[reportArgumentType]
    names = {op.name for op in plain.operators}
    same = [op for op in graph.operators if op.name in names]
    assert len(same) == len(plain.operators)
    assert forward_flops(same, extended) == forward_flops(list(plain.operators), sizes)
    added = [op for op in graph.operators if op.name not in names and is_matmul(op.kind)]
    assert bool(added) == (options.lora_rank is not None)


def test_offload_moves_its_fraction_of_the_saved_bytes_and_changes_no_operator() -> None:
    options = Options(compute="bf16", offload=0.25)
    graph, sizes = rewritten(options)
    assert graph == rewritten(Options(compute="bf16"))[0]
    parted = offload.part(graph, sizes, liveness(graph, sizes), options)
    assert parted.moved[0] == (16 * HIDDEN + 8 * FFN + 4 * HEADS + 2 * 4) * SEQ / 4
    assert parted.stays[0] == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(compute="int4"), "^precision=int4"),
        (Options(compute="fp8", recipe="blockwise"), "^precision.recipe=blockwise"),
        (Options(compute="fp8", activations="fp4"), "^precision.activations=fp4"),
        (Options(compute="fp8", activations="fp8", recompute="full"), "recompute full"),
        (Options(compute="bf16", attention="ring"), "^attention=ring"),
        (Options(compute="bf16", recompute="some"), "^recompute=some"),
        (Options(compute="bf16", lora_rank=0), "^lora.rank=0"),
        (Options(compute="bf16", base_dtype="nf4"), "^lora.base=nf4.*lora.rank"),
        (Options(compute="bf16", lora_rank=8, base_dtype="int3"), "^lora.base=int3"),
        (Options(compute="bf16", offload=1.5), "^offload.activations=1.5"),
    ],
)
def test_unknown_settings_are_refused(options: Options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rewritten(options)


@pytest.mark.parametrize(
    "techniques",
    [
        {"recompute": {"mode": "per_op"}},
        {"attention": {"kernel": "unfused"}, "recompute": {"mode": "selective"}},
        {"precision": {"compute": "fp8", "recipe": "rowwise"}},
        {"precision": {"compute": "nvfp4"}},
        {"precision": {"compute": "fp8", "recipe": "coat", "activations": "fp8"}},
        {"offload": {"activations": 0.5}},
    ],
    ids=lambda techniques: "-".join(techniques),
)
def test_bound_never_exceeds_the_simulator_under_techniques(
    make_plan: Callable[..., Plan], techniques: dict[str, dict[str, Any]]
) -> None:
    blocks = techniques.get("precision", {}).get("compute") in ("mxfp8", "nvfp4")  # not on Hopper
    plan = make_plan("llama-2-7b", "8xB200" if blocks else "8xH100", seq_tokens=SEQ, tp=2, pp=2,
                     dp_shard=2, zero=1, sp=True)  # fmt: skip
    (setting,) = plan.phase.settings
    changed = msgspec.structs.replace(setting, techniques=setting.techniques | techniques)
    phase = msgspec.structs.replace(plan.phase, settings=(changed,))
    plan = msgspec.structs.replace(plan, phases=(phase,))
    options = Options.of(phase, plan.workload)
    bound = bound_layouts(plan.model, plan.cluster, plan.workload, Layouts.of(phase), options)
    result = estimate(plan)
    assert 0 < bound.time_s[0] <= result.step_s.median * (1 + 1e-9)
    assert 0 < bound.memory_bytes[0] <= result.peak_memory_bytes.median * (1 + 1e-9)
