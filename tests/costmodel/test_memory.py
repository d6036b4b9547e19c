"""Memory: published ledgers, states by stack and optimiser, and what techniques may never do."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster, load_model, load_stack
from forerun.cluster import Cluster
from forerun.costmodel import Layouts, bound_layouts, estimate
from forerun.costmodel.kept import Kept
from forerun.costmodel.options import Options
from forerun.costmodel.pieces import Pieces
from forerun.costmodel.priced_pieces import pieces
from forerun.costmodel.prices import Prices
from forerun.costmodel.stages import Load
from forerun.costmodel.state_bytes import StateBytes
from forerun.costmodel.states import AtRest, Counts
from forerun.costmodel.techniques.offload import GRAIN_BYTES
from forerun.plan import Plan
from forerun.stack import Stack
from forerun.units import GIB

MakePlan = Callable[..., Plan]


def _layouts(**degrees: int) -> Layouts:
    names = ("micro_batch_seqs", "num_microbatches", "dp_replicate", "dp_shard", "tp", "pp", "vpp",
             "cp", "ulysses", "ep")  # fmt: skip
    values = {name: np.array([degrees.get(name, 1)]) for name in names}
    zeros = ("zero", "sequence_parallel", "schedule")
    return Layouts(**values, **{name: np.array([degrees.get(name, 0)]) for name in zeros})


def _cluster(stack: Stack, gpus: str = "8xA100-80GB") -> Cluster:
    cluster = load_cluster(gpus)
    pool = msgspec.structs.replace(cluster.pools[0], stack=stack)
    return msgspec.structs.replace(cluster, pools=(pool,))


def _pieces(name: str, layouts: Layouts, options: Options, stack: Stack) -> Pieces:
    prices = Prices(_cluster(stack).pools[0], None)
    return pieces(load_model(name), layouts, 2048, prices, options)


def _layers_alone(count: float) -> Load:
    return Load(layers=(np.array([count]),), embedding=np.zeros(1), head=np.zeros(1))


KORTHIKANTI = [
    # model, tp, pp, micro-batch, chunks, then GiB: states, activations of none, of sp + selective
    ("gpt-22b", 8, 1, 4, 1, 45.56, 59.25, 9.56),
    ("gpt3-175b", 8, 8, 1, 3, 45.56, 66.84, 12.35),
    ("gpt-529.6b", 8, 35, 1, 3, 31.64, 114.02, 23.08),
    ("megatron-1t", 8, 64, 1, 1, 32.96, 131.25, 26.56),
]
"""Korthikanti et al. 2022 (arXiv 2205.05198), figure 1, first pipeline rank, as evaluated by
Calculon: layers alone, 2048 tokens."""


@pytest.mark.parametrize(
    ("name", "tp", "pp", "batch", "vpp", "states", "none", "best"), KORTHIKANTI
)
def test_matches_korthikanti_figure_1(
    name: str, tp: int, pp: int, batch: int, vpp: int, states: float, none: float, best: float
) -> None:
    """Their models drop out behind attention and MLP: two masks of a byte that ours do not have."""
    stack = load_stack("megatron", "a100")
    model = load_model(name)
    in_flight = pp * (1 + (pp - 1) / (pp * vpp)) if vpp > 1 else pp
    layers = model.num_layers / pp
    masks = 2 * batch * 2048 * model.hidden
    for recompute, sp, expected in (("none", 0, none), ("selective", 1, best)):
        layouts = _layouts(tp=tp, pp=pp, vpp=vpp, micro_batch_seqs=batch, sequence_parallel=sp)
        options = Options(compute="fp16", attention="unfused", recompute=recompute)
        costs = _pieces(name, layouts, options, stack)
        kept = float(Kept.of(costs, layouts, stack).layers[0].saved[0])
        total = (kept + masks / (tp if sp else 1)) * layers * in_flight
        assert total / GIB == pytest.approx(expected, rel=0.02)
        load = _layers_alone(layers)
        rest = AtRest.of(Counts.of(load, costs), StateBytes.of(stack, options), layouts, stack)
        at_rest = rest.parameters + rest.gradients + rest.optimizer
        assert float(at_rest[0]) / GIB == pytest.approx(states, rel=0.02)


def _bytes_per_param(stack: Stack, options: Options, **degrees: int) -> tuple[float, float, float]:
    layouts = _layouts(**degrees)
    costs = _pieces("llama-2-7b", layouts, options, stack)
    counts = Counts.of(_layers_alone(32.0), costs)
    rest = AtRest.of(counts, StateBytes.of(stack, options), layouts, stack)
    whole = float(counts.trained[0])
    values = (rest.parameters, rest.gradients, rest.optimizer)
    return tuple(float(v[0]) / whole for v in values)  # pyright: ignore[reportReturnType]


BF16 = Options(compute="bf16")
MEGATRON, FSDP = load_stack("megatron", "h100"), load_stack("pytorch-fsdp", "h100")
PURE_16 = load_stack("torchtune", "a100")


@pytest.mark.parametrize(
    ("stack", "options", "degrees", "expected"),
    [
        # Megatron-LM's theoretical_memory_usage.py: 18, and 6 + 12 / D with the distributed one
        (MEGATRON, BF16, {"dp_replicate": 8}, (2, 4, 12)),
        (MEGATRON, BF16, {"dp_shard": 4, "cp": 2, "zero": 1}, (2, 4, 12 / 8)),
        (MEGATRON, BF16, {"dp_shard": 8, "zero": 2}, (2, 4 / 8, 12 / 8)),
        (MEGATRON, BF16, {"dp_shard": 8, "zero": 3}, (2 / 8, 4 / 8, 12 / 8)),
        (FSDP, BF16, {"dp_shard": 8, "zero": 3}, (4 / 8, 4 / 8, 8 / 8)),
        (FSDP, BF16, {"dp_shard": 4, "cp": 2, "zero": 1}, (4 / 8, 4 / 8, 8 / 8)),
        (FSDP, Options(compute="bf16", optimizer="sgd"), {}, (4, 4, 0)),
        # torchao's README: codes of one byte and an fp32 scale per 256; COAT: 2.1875
        (FSDP, Options(compute="bf16", optimizer="adamw8bit"), {}, (4, 4, 2.03125)),
        (FSDP, Options(compute="bf16", optimizer="adamw_fp8"), {}, (4, 4, 2.1875)),
        (PURE_16, BF16, {}, (2, 2, 4)),
        (PURE_16, Options(compute="bf16", optimizer="adamw8bit"), {}, (2, 2, 2.03125)),
    ],
)
def test_bytes_per_parameter(
    stack: Stack, options: Options, degrees: dict[str, int], expected: tuple[float, ...]
) -> None:
    assert _bytes_per_param(stack, options, **degrees) == pytest.approx(expected)


def test_adapters_on_a_4_bit_base() -> None:
    """Rank 8 on the seven linears of Llama-2-7B: 8 (8 h + 3 (h + f)) of 202 M weights per layer."""
    layouts = _layouts()
    options = Options(compute="bf16", lora_rank=8, base_dtype="nf4")
    costs = _pieces("llama-2-7b", layouts, options, PURE_16)
    counts = Counts.of(_layers_alone(1.0), costs)
    adapters = 8 * (8 * 4096 + 3 * (4096 + 11008))
    assert float(counts.trained[0]) == adapters
    rest = AtRest.of(counts, StateBytes.of(PURE_16, options), layouts, PURE_16)
    base = 4 * 4096**2 + 3 * 4096 * 11008
    expected = base * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * adapters
    assert float(rest.parameters[0]) == pytest.approx(expected, rel=1e-3)  # norms: 2 h in 16 bits
    assert float(rest.gradients[0]) == 2 * adapters
    assert float(rest.optimizer[0]) == 4 * adapters


def test_experts_are_divided_over_the_ranks_that_hold_them() -> None:
    """8 experts over ep=4: 2 on a rank, whose states dp_shard * cp / ep = 2 ranks share."""
    layouts = _layouts(dp_shard=8, ep=4, zero=1)
    costs = _pieces("mixtral-8x7b", layouts, BF16, MEGATRON)
    counts = Counts.of(_layers_alone(1.0), costs)
    assert float(counts.experts[0]) == 2 * 3 * 4096 * 14336
    rest = AtRest.of(counts, StateBytes.of(MEGATRON, BF16), layouts, MEGATRON)
    expected = 12 * (float(counts.experts[0]) / 2 + float(counts.trained[0]) / 8)
    assert float(rest.optimizer[0]) == pytest.approx(expected)


def _with_stack(plan: Plan, **changes: object) -> Plan:
    stack = msgspec.structs.replace(plan.cluster.pools[0].stack, **changes)
    pool = msgspec.structs.replace(plan.cluster.pools[0], stack=stack)
    cluster = msgspec.structs.replace(plan.cluster, pools=(pool,))
    return msgspec.structs.replace(plan, cluster=cluster)


def test_logits_take_the_bytes_that_the_loss_of_a_stack_needs(make_plan: MakePlan) -> None:
    plan = make_plan(dp_shard=8, zero=3, global_batch_seqs=8, recompute="full")
    logits = 8192 * 128256
    for per_logit in (14.0, 16.0):
        terms = estimate(_with_stack(plan, logit_bytes=per_logit)).memory_terms_bytes
        assert terms["logits_loss"] == per_logit * logits
    chunked = estimate(_with_stack(plan, logit_bytes=2.0)).peak_memory_bytes.median
    assert chunked < estimate(_with_stack(plan, logit_bytes=14.0)).peak_memory_bytes.median


def test_a_pipeline_stage_of_fsdp_accumulates_whole_fp32_gradients(make_plan: MakePlan) -> None:
    """Of 8 layers of Llama-3.1-8B and, on the first stage, the embedding."""
    plan = make_plan(pp=4, dp_shard=2, zero=3, global_batch_seqs=32, recompute="full")
    terms = estimate(plan).memory_terms_bytes
    layers = 8 * plan.model.layers[0].num_params(4096)
    ends = 4096 * 128256 + 4096, 4096 * 128256
    assert any(terms["gradients"] == pytest.approx(4 * (layers + n), rel=0.01) for n in ends)
    assert any(
        terms["gathered_parameters"] == pytest.approx(2 * (layers + n), rel=0.01) for n in ends
    )


@pytest.mark.parametrize("sp", [0, 1])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_recompute_keeps_less_and_needs_the_rest_again(attention: str, sp: int) -> None:
    """Kept falls from mode to mode; what a flash layer dropped is back in its own backward."""
    layouts = _layouts(tp=2, sequence_parallel=sp)
    modes = ("none", "selective", "per_op", "full")
    lives = []
    for mode in modes:
        options = Options(compute="bf16", attention=attention, recompute=mode)
        lives.append(Kept.of(_pieces("llama-2-7b", layouts, options, FSDP), layouts, FSDP))
    saved = [float(live.layers[0].saved[0]) for live in lives]
    working = [float(live.layers[0].backward_peak[0]) for live in lives]
    assert saved == sorted(saved, reverse=True)
    assert saved[3] < 0.2 * saved[0]
    if attention == "flash":  # unfused scores come back when the other half of the layer is gone
        assert min(working) > 0.8 * working[0]


@given(fraction=st.floats(0.0, 1.0))
@settings(max_examples=10)
def test_offload_keeps_its_fraction_elsewhere(fraction: float) -> None:
    layouts = _layouts()
    kept = [
        Kept.of(_pieces("llama-2-7b", layouts, options, FSDP), layouts, FSDP).layers[0].saved
        for options in (BF16, Options(compute="bf16", offload=fraction))
    ]
    rounded = kept[1] - kept[0] * (1 - fraction)  # whole elements move
    assert rounded == pytest.approx(0, abs=GRAIN_BYTES + 1e-3)


@given(
    stack=st.sampled_from(["megatron", "nanotron", "torchtitan", "coat"]),
    recompute=st.sampled_from(["none", "selective", "per_op", "full"]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    zero=st.sampled_from([0, 1, 2, 3]),
    sp=st.booleans(),
)
@settings(max_examples=30)
def test_bound_never_exceeds_the_simulator_on_any_stack(
    make_plan: MakePlan, stack: str, recompute: str, tp: int, pp: int, zero: int, sp: bool
) -> None:
    dp = 8 // (tp * pp)
    degrees = {"dp_shard": dp} if zero else {"dp_replicate": dp}
    plan = make_plan(
        tp=tp, pp=pp, zero=zero, sp=sp and tp > 1, recompute=recompute, seq_tokens=2048, **degrees
    )
    pool = msgspec.structs.replace(plan.cluster.pools[0], stack=load_stack(stack, "h100"))
    cluster = msgspec.structs.replace(plan.cluster, pools=(pool,))
    plan = msgspec.structs.replace(plan, cluster=cluster)
    result = estimate(plan)
    bound = bound_layouts(
        plan.model, plan.cluster, plan.workload, Layouts.of(plan.phase), Options.of(plan.phase)
    )
    assert bound.memory_bytes[0] <= result.peak_memory_bytes.median * (1 + 1e-9)
    assert sum(result.memory_terms_bytes.values()) == pytest.approx(result.peak_memory_bytes.median)
