"""Published rows as plans, conventions between metrics, and scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec
import pytest

from forerun.catalogs import load_stack, stacks_for
from forerun.catalogs import names as catalog_names
from forerun.catalogs.stacks_for import Published, stack_for_layout, stack_named_for
from forerun.costmodel.validate import (
    Case,
    Outcome,
    Row,
    Unread,
    build_cases,
    evaluate,
    outcomes,
    read_table,
    settled,
    validate,
)
from forerun.costmodel.validate.baseline import baseline_errors
from forerun.costmodel.validate.build import Candidate
from forerun.costmodel.validate.cells import LADDER
from forerun.costmodel.validate.clusters import network_bytes_per_s
from forerun.costmodel.validate.conventions import memory_unit_bytes, step_flops, work
from forerun.costmodel.validate.predict import MEMORY_DOUBT, error_of, price
from forerun.costmodel.validate.ranking import kendall_tau_b, regret
from forerun.costmodel.validate.table import parse_row
from forerun.errors import InputError
from forerun.stack import Stack
from forerun.units import GIB

TABLE = Path(__file__).parent.parent / "validation" / "published_dev.csv"
Make = Callable[..., Row]

BASE = {
    "id": "one", "source": "somewhere", "hardware": "H100-SXM-80GB", "gpus": "8",
    "gpus_per_node": "8", "model": "llama-3.1-8b", "seq_len": "4096", "global_batch_seqs": "32",
    "micro_batch_seqs": "1", "dp": "8", "tp": "1", "pp": "1", "vpp": "1", "cp": "1", "ep": "1",
    "zero_stage": "3", "sequence_parallel": "0", "recompute": "none", "precision": "bf16",
    "metric": "iter_time_s", "value": "1.0",
}  # fmt: skip


def row(**cells: object) -> Row:
    """A row of eight H100 with FSDP, but for the cells given."""
    return parse_row({**BASE, **{name: str(value) for name, value in cells.items()}}, "one")


def case(**cells: object) -> Case:
    """The case of such a row."""
    (found,) = build_cases([row(**cells)])
    assert isinstance(found, Case), found
    return found


def reason(**cells: object) -> str:
    """Why such a row makes no plan."""
    (found,) = build_cases([row(**cells)])
    assert isinstance(found, Unread)
    return found.reason


def candidates(found: Case) -> list[Candidate]:
    return [candidate for ladder in found.ladders for candidate in ladder]


@pytest.fixture(scope="module")
def published() -> tuple[Row, ...]:
    rows = read_table(TABLE)
    assert all(isinstance(found, Row) for found in rows)
    return tuple(found for found in rows if isinstance(found, Row))


@pytest.fixture(scope="module")
def published_cases(published: tuple[Row, ...]) -> tuple[Case | Unread, ...]:
    return build_cases(published)


def test_every_published_row_becomes_a_plan(published_cases: tuple[Case | Unread, ...]) -> None:
    for found in published_cases:
        assert isinstance(found, Case), found
        for candidate in candidates(found):
            phase = candidate.plan.phase
            assert phase.mesh.world == candidate.plan.cluster.num_devices == found.row.gpus
            assert phase.stages[-1].layers[1] == found.model.num_layers - 1


def test_shape_columns_go_before_the_catalog() -> None:
    found = case(model="gpt3-175b", layers=10, vocab=50257, heads=96, hidden=12288).model
    assert (found.num_layers, found.vocab, found.tied_embeddings) == (10, 50257, True)
    assert found.layers[0].bias and found.max_positions == 4096


def test_an_unknown_model_needs_a_shape() -> None:
    shape = {"layers": 4, "hidden": 512, "heads": 8, "ffn_hidden": 2048, "vocab": 1000}
    found = case(model="my-own", notes="mlp=gelu;tied_embed=1", **shape).model
    layer = found.layers[0]
    assert (layer.mlp, layer.norm, layer.head_dim, layer.kv_heads) == ("gelu", "layernorm", 64, 8)
    assert "vocab" in reason(model="my-own", layers=4, hidden=512, heads=8, ffn_hidden=2048)


def test_experts_are_read_from_the_note() -> None:
    notes = "mlp=swiglu_moe;moe=16 experts,top4,1 shared,head_dim32;first 1 layers dense ffn 999"
    found = case(model="my-moe", layers=4, hidden=512, heads=8, ffn_hidden=256, vocab=1000,
                 notes=notes).model  # fmt: skip
    dense, routed = found.layers
    assert (dense.repeat, dense.ffn_hidden, dense.experts) == (1, 999, None)
    assert routed.repeat == 3 and routed.head_dim == 32 and routed.experts is not None
    experts = routed.experts
    assert (experts.num_experts, experts.top_k) == (16, 4)
    assert (experts.ffn_hidden, experts.shared_ffn_hidden) == (256, 256)


def test_a_vocabulary_that_tp_does_not_divide_is_padded() -> None:
    found = case(model="gpt3-175b", vocab=50257, tp=8, dp=1, zero_stage=1)
    assert found.model.vocab == 50257
    assert candidates(found)[0].plan.model.vocab == 51200  # the next multiple of 128 * 8


def test_what_a_stack_gives_reason_to_doubt_is_searched_and_its_vocabulary_stays_odd() -> None:
    cells = {"hardware": "A100-SXM-80GB", "model": "gpt3-1.3b", "vocab": 50257, "zero_stage": 0,
             "recompute": "full"}  # fmt: skip
    doubted = candidates(case(source="vtrain-single", **cells))
    assert {c.plan.phase.recompute for c in doubted} >= {"none", "full"}
    assert doubted[0].plan.model.vocab == 50257
    believed = candidates(case(source="vtrain-multi", **cells))
    assert {c.plan.phase.recompute for c in believed} == {"full"}
    assert believed[0].plan.model.vocab == 50304


@pytest.mark.parametrize(
    ("note", "devices", "bytes_per_s"),
    [
        ("NVLink/NVSwitch; 800 Gb/s per node (default)", 8, 12.5e9),
        ("NVLink node; 1600 Gb/s RoCE per node", 8, 25e9),
        ("8x200 Gb/s HDR IB per node (Selene)", 8, 25e9),
        ("NVSwitch node of 8; 400 Gb/s per GPU IB or RoCE", 8, 50e9),
        ("NVSwitch node of 8", 8, None),
        ("fast network per node", 8, None),
    ],
)
def test_the_network_rate_is_read_from_the_note(
    note: str, devices: int, bytes_per_s: float | None
) -> None:
    assert network_bytes_per_s(note, devices) == bytes_per_s


def test_an_nvlink_domain_over_hosts_is_one_node() -> None:
    found = case(hardware="GB200-NVL72", gpus=256, gpus_per_node=4, dp=256, global_batch_seqs=256)
    pool = candidates(found)[0].plan.cluster.pools[0]
    assert (pool.num_nodes, pool.devices_per_node) == (4, 64)


def test_zero_decides_what_dp_shards() -> None:
    def mesh(**cells: object) -> tuple[int, int]:
        found = candidates(case(**cells))[0].plan.phase.mesh
        return found.dp_replicate, found.dp_shard

    assert mesh(zero_stage=3) == (1, 8)
    assert mesh(zero_stage=1) == (1, 8)
    assert mesh(zero_stage=0) == (8, 1)
    assert mesh(zero_stage=3, notes="FSDP shard group 4, replicated above it") == (2, 4)


def test_techniques_of_a_row() -> None:
    found = case(
        precision="fp8_coat", optimizer="adamw_fp8_states", recompute="selective",
        attention_kernel="unfused", offload="activations",
        notes="selective per-op AC;torch.compile;recipe offloads activations of 8 layers to host",
    )  # fmt: skip
    plan = candidates(found)[0].plan
    assert plan.workload.optimizer == "adamw_fp8"
    assert dict(plan.phase.settings[0].techniques) == {
        "precision": {"compute": "fp8", "recipe": "coat", "activations": "fp8"},
        "recompute": {"mode": "per_op"},
        "attention": {"kernel": "unfused"},
        "runtime": {"mode": "compiled"},
        "offload": {"activations": 0.25},
    }


def test_a_stack_says_how_it_launches_where_the_row_does_not() -> None:
    def runtime(**cells: object) -> object:
        return candidates(case(gpus=1, dp=1, zero_stage=0, **cells))[0].plan.phase.technique(
            "runtime"
        )

    assert runtime(stack="torchtune-a100") == {"mode": "compiled"}
    assert runtime(stack="torchtune-baseline-a100") == {}
    assert runtime(stack="torchtune-a100", notes="CUDA graphs") == {"mode": "graphs"}


def test_adapters_have_the_stated_parameters() -> None:
    """litgpt's phi-1.5 rows: 1,572,864 parameters = rank 8 on Q and V, about rank 2 everywhere."""
    lora = candidates(case(model="phi-1.5", notes="task=lora;trainable_params=1572864"))[0]
    assert lora.plan.phase.technique("lora") == {"rank": 2, "targets": "all"}
    nf4 = candidates(case(precision="bf16+nf4", notes="task=lora;lora_rank=4"))[0]
    assert nf4.plan.phase.technique("lora") == {"rank": 4, "base": "nf4", "targets": "all"}


def test_embedding_and_head_counted_as_chunks_join_the_others() -> None:
    """Llama 405B: 126 layers on 16 x 8 = 128 chunks, as its vendor counts."""
    found = case(model="llama-3.1-405b", gpus=128, dp=1, tp=8, pp=16, vpp=8, zero_stage=1)
    (candidate,) = candidates(found)
    mesh = candidate.plan.phase.mesh
    assert (mesh.vpp, mesh.num_stages) == (7, 112)
    assert candidate.changed == ("vpp=8 priced as 7",)


def test_uneven_chunks_and_rounds_are_plans() -> None:
    found = candidates(case(pp=4, vpp=3, dp=2, zero_stage=1, global_batch_seqs=20))[0]
    sizes = [stage.num_layers for stage in found.plan.phase.stages]
    assert (len(sizes), sum(sizes), max(sizes) - min(sizes)) == (12, 32, 1)
    assert (found.micro_batches, found.plan.phase.num_microbatches) == (10.0, 12)


@pytest.mark.parametrize(
    ("cells", "word"),
    [
        ({"hardware": "H1000"}, "hardware=H1000"),
        ({"model": "llama-99"}, "not in the catalog"),
        ({"tp": 3}, "degrees"),
        ({"pp": 64, "gpus": 512}, "degrees"),
        ({"pp": 4, "dp": 2, "vpp": 9}, "vpp"),
        ({"ep": 3}, "ep"),
        ({"global_batch_seqs": 4}, "fewer sequences"),
        ({"precision": "fp7"}, "precision"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"offload": "optimizer"}, "offload"),
        ({"notes": "mlp=relu"}, "mlp"),
        ({"stack": "nothing"}, "stack"),
    ],
)
def test_a_row_that_makes_no_plan_says_why(cells: dict[str, object], word: str) -> None:
    assert word in reason(**cells)


@pytest.mark.parametrize(
    "cells",
    [
        {"gpus": "eight"}, {"gpus": "0"}, {"seq_len": "-1"}, {"seq_len": "nan"}, {"dp": "1.5"},
        {"value": "0"}, {"value": "inf"}, {"value": ""}, {"zero_stage": "4"}, {"layers": "1e9"},
        {"metric": "fps"}, {"recompute": "some"}, {"model": ""}, {"gpus": "9" * 40},
    ],
)  # fmt: skip
def test_bad_cells_are_refused(cells: dict[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        row(**cells)
    assert caught.value.field == next(iter(cells))


def test_empty_cells_take_the_values_of_siblings() -> None:
    stated = row(recompute="full", micro_batch_seqs=2)
    other = row(recompute="none", micro_batch_seqs=4, model="llama-2-7b")
    open_row = row(recompute="", micro_batch_seqs="")
    found = build_cases([stated, other, open_row])[2]
    assert isinstance(found, Case)
    (only,) = candidates(found)
    assert only.filled == ("micro_batch_seqs=2", "recompute=full")


def test_chunks_come_from_siblings_with_the_same_pipeline() -> None:
    wide = row(pp=4, dp=2, vpp=2, zero_stage=1)
    deep = row(pp=2, dp=4, vpp=8, zero_stage=1)
    cases = build_cases([wide, deep, row(pp=4, dp=2, vpp="", zero_stage=1)])
    assert isinstance(cases[2], Case)
    assert {c.plan.phase.mesh.vpp for c in candidates(cases[2])} == {2}
    noted = case(pp=4, dp=2, vpp="", zero_stage=1, notes="interleaved 1F1B")
    assert {c.plan.phase.mesh.vpp for c in candidates(noted)} == {2, 4, 8}


def test_empty_cells_without_siblings_are_searched() -> None:
    found = case(recompute="", micro_batch_seqs="")
    assert [len(ladder) for ladder in found.ladders] == [len(LADDER)] * 3  # 1, 2, 4 of four
    (outcome,) = outcomes([found])
    assert isinstance(outcome, Outcome)
    chosen = outcome.prediction
    assert chosen.fit_probability >= 0.5
    rivals = [p for c in candidates(found) if (p := price(c)).fit_probability >= 0.5]
    assert chosen.step_s.median == min(p.step_s.median for p in rivals)


def test_full_recomputation_is_tried_on_some_layers_before_all() -> None:
    """The last of every stage; more layers take more time and less memory."""
    found = case(recompute="", pp=2, dp=4, zero_stage=1, global_batch_seqs=32)
    (ladder,) = found.ladders
    half = ladder[-3]
    assert half.filled == ("recompute=full of 50% of the layers",)
    modes = [half.plan.phase.technique("recompute", i).get("mode") for i in range(32)]
    assert modes == (["elementwise"] * 8 + ["full"] * 8) * 2
    priced = [price(candidate) for candidate in ladder[-5:]]
    steps, peaks = (
        [p.step_s.median for p in priced],
        [p.peak_memory_bytes.median for p in priced],
    )
    assert steps == sorted(steps) and peaks == sorted(peaks, reverse=True)


def test_a_stack_says_how_many_micro_batches_fill_its_pipelines() -> None:
    """torchtitan: as many as there are pipeline ranks."""
    cells = {"pp": 4, "dp": 2, "zero_stage": 3, "micro_batch_seqs": ""}
    (only,) = candidates(case(source="torchtitan", **cells))
    assert only.plan.phase.num_microbatches == 4
    assert only.filled == ("micro_batch_seqs=4",)
    assert len(candidates(case(source="unheard-of", **cells))) > 1


def test_samples_for_fine_tuning_are_packed_where_the_stack_says_so() -> None:
    def documents(**cells: object) -> object:
        (candidate,) = candidates(case(zero_stage=1, **cells))
        return candidate.plan.phase.technique("attention").get("documents")

    assert documents(source="nvidia-dgxc", notes="task=sft") == 256
    assert documents(source="nvidia-dgxc", notes="task=pretrain") is None
    assert documents(source="unheard-of", notes="task=sft") is None


def test_sources_may_be_taken_as_unknown() -> None:
    (found,) = build_cases([row(source="llm-foundry")], named=False)
    assert isinstance(found, Case)
    (candidate,) = candidates(found)
    assert candidate.plan.cluster.pools[0].stack.name == "pytorch-fsdp-h100"


def test_what_never_fits_takes_a_plan_near_the_leanest() -> None:
    found = case(model="llama-3.1-405b", zero_stage=0, recompute="")
    (outcome,) = outcomes([found])
    assert isinstance(outcome, Outcome)
    least = min(price(c).peak_memory_bytes.median for c in candidates(found))
    assert least <= outcome.prediction.peak_memory_bytes.median <= least * (1 + MEMORY_DOUBT)


def test_an_open_layout_multiplies_to_the_devices() -> None:
    found = case(dp="", tp="", pp="", gpus=16, global_batch_seqs=64, zero_stage=1)
    meshes = {(m.dp, m.tp, m.pp) for c in candidates(found) for m in [c.plan.phase.mesh]}
    assert (16, 1, 1) in meshes and (2, 8, 1) in meshes and (1, 8, 2) in meshes
    assert all(math.prod(degrees) == 16 for degrees in meshes)


def test_a_part_of_a_micro_batch_costs_that_part() -> None:
    """Time is linear in the micro-batches: 2.5 lies between 2 and 3."""

    def step_s(batch: int) -> float:
        (candidate,) = candidates(case(micro_batch_seqs=2, global_batch_seqs=batch, zero_stage=0))
        return price(candidate).step_s.median

    two, half, three = step_s(32), step_s(40), step_s(48)
    assert half == pytest.approx((two + three) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("unheard-of", 6 * (32 * (2 * 4096 * 5120 + 3 * 4096 * 14336) + 4096 * 128256)
         + 12 * 32 * 4096 * 8192),
        ("megatron-bridge", 6 * (32 * (2 * 4096 * 5120 + 3 * 4096 * 14336) + 4096 * 128256)
         + 6 * 32 * 4096 * 8192),
        ("llm-foundry", 6 * 8.03e9 + 12 * 32 * 4096 * 8192),
    ],
)  # fmt: skip
def test_flops_are_counted_as_the_source_does(source: str, expected: float) -> None:
    """Llama-3-8B: 32 layers, hidden 4096, 32 + 8 heads of 128, ffn 14336, vocabulary 128256."""
    found = case(source=source, seq_len=8192, n_params_b=8.03)
    assert step_flops(found.row, found.model, 1) == pytest.approx(expected * 8192, rel=1e-12)


def test_matches_narayanan_2021_equation_3() -> None:
    """96 B s L h^2 (1 + s/6h + V/16Lh), with full recomputation; GPT-3 shape."""
    b, s, h, l, v = 1536, 2048, 12288, 96, 51200
    found = case(source="sc21-megatron", model="gpt3-175b", seq_len=s, global_batch_seqs=b)
    expected = 96 * b * s * l * h**2 * (1 + s / (6 * h) + v / (16 * l * h))
    assert step_flops(found.row, found.model, b) == pytest.approx(expected, rel=1e-12)


def test_printed_tflops_follow_from_printed_tokens(published: tuple[Row, ...]) -> None:
    """Rows that print both: the convention turns tokens/s into the TFLOP/s of the same row."""
    ratios: dict[str, list[float]] = {}
    for found in build_cases(
        [r for r in published if r.metric == "tokens_per_s_per_gpu" and r.note("src_tflops")]
    ):
        assert isinstance(found, Case)
        if found.model.layers[-1].experts is None and found.row.note("task") != "lora":
            per_token = step_flops(found.row, found.model, 1) / found.row.seq_len
            printed = float(found.row.note("src_tflops") or 0) * 1e12
            ratio = per_token * found.row.value / printed
            ratios.setdefault(found.row.source, []).append(ratio)
    for source, values in ratios.items():
        if source != "llm-foundry":  # whose src_tflops count recomputation
            assert median(values) == pytest.approx(1.0, abs=0.02), source
    assert len(ratios) >= 4


def test_printed_mfu_of_llm_foundry_is_reproduced(published: tuple[Row, ...]) -> None:
    rows = [r for r in published if r.source == "llm-foundry" and r.precision == "bf16"]
    assert len(rows) > 100
    peaks = {"A100": 312e12, "H100": 989.4e12}
    for found in build_cases(rows):
        assert isinstance(found, Case)
        per_token = step_flops(found.row, found.model, 1) / found.row.seq_len
        mfu = per_token * found.row.value / peaks[found.row.hardware[:4]]
        assert 100 * mfu == pytest.approx(float(found.row.note("mfu_pct") or 0), rel=3e-3)


@pytest.mark.parametrize(
    ("metric", "value"),
    [("iter_time_s", 2.0), ("tokens_per_s_per_gpu", 8192.0), ("tflops_per_gpu", 400.0)],
)
def test_errors_are_on_step_time_in_every_metric(metric: str, value: float) -> None:
    """A prediction that is twice the measured time is an error of +100 %, not of -50 %."""
    found = case(metric=metric, value=value)
    (candidate,) = candidates(found)
    prediction = price(candidate)
    device = candidate.plan.cluster.pools[0].device
    rate_work = work(found.row, found.model, device, 32)
    step_s = prediction.step_s.median
    twice_as_fast = step_s / 2 if metric == "iter_time_s" else rate_work / (step_s / 2)
    again = case(metric=metric, value=twice_as_fast)
    assert error_of(again, prediction) == pytest.approx(1.0, rel=1e-9)


def test_a_note_decides_between_gb_and_gib() -> None:
    assert memory_unit_bytes(row()) == GIB
    assert memory_unit_bytes(row(notes="memory column printed as GB")) == 10**9
    assert memory_unit_bytes(row(notes="unit printed GB (10^9 per the tool)")) == 10**9
    assert memory_unit_bytes(row(notes="printed as GB but GiB")) == GIB


def test_constants_of_a_stack_can_be_changed_between_evaluations() -> None:
    cases = settled(outcomes([case(recompute="")]))
    (candidate,) = candidates(cases[0])
    stack = candidate.plan.cluster.pools[0].stack
    (before,) = evaluate(cases)
    efficiency = {"gemm_efficiency.bf16": stack.gemm_efficiency["bf16"] / 2}
    (slower,) = evaluate(cases, {stack.name: efficiency})
    assert slower > before + 0.2
    assert evaluate(cases, {"another": efficiency}) == [before]
    assert evaluate(cases) == [before]
    with pytest.raises(InputError, match="no such constant"):
        evaluate(cases, {stack.name: {"speed": 1.0}})


def test_tau_b_matches_scipy_with_and_without_ties() -> None:
    from scipy.stats import kendalltau

    x, y = [3.0, 1.0, 2.0, 2.0, 5.0, 4.0], [2.0, 1.0, 3.0, 3.0, 3.0, 6.0]
    assert kendall_tau_b(x, y) == pytest.approx(kendalltau(x, y)[0])
    assert kendall_tau_b([1, 2, 3], [3, 2, 1]) == -1.0
    assert math.isnan(kendall_tau_b([1, 1], [1, 2]))


def test_regret_is_what_following_the_prediction_costs() -> None:
    assert regret([2.0, 1.0, 3.0], [10.0, 12.0, 11.0]) == pytest.approx(0.2)
    assert regret([1.0, 2.0], [10.0, 12.0]) == 0.0


def test_the_document_counts_and_averages() -> None:
    """Three plans for one job, a memory row, and one that cannot be read."""
    rows = [
        row(id="a", value=1.0),
        row(id="b", value=1.2, micro_batch_seqs=2),
        row(id="c", value=1.4, micro_batch_seqs=4),
        row(id="d", source="elsewhere", value=2.0),
        row(id="e", metric="peak_mem_gib", value=40.0),
        row(id="f", hardware="abacus"),
    ]
    found = validate(rows)
    lines, summary = found["rows"], found["summary"]
    assert (summary["rows"], summary["scored"]) == (6, 5)
    assert lines[5]["predicted"] is None and "abacus" in lines[5]["note"]
    apes = [line["ape"] for line in lines[:4]]
    assert summary["mean_ape"] == pytest.approx(sum(apes) / 4)
    assert summary["macro_mean_ape"] == pytest.approx((sum(apes[:3]) / 3 + apes[3]) / 2)
    assert summary["median_ape"] == pytest.approx(median(apes))
    for line in lines[:5]:
        assert line["ape"] == pytest.approx(abs(line["predicted"] / line["measured"] - 1))
        assert line["low"] <= line["predicted"] <= line["high"]
    inside = sum(line["low"] <= line["measured"] <= line["high"] for line in lines[:4])
    assert summary["coverage"] == inside / 4
    assert summary["memory"]["rows"] == 1 and set(summary["by_source"]) == {
        "somewhere",
        "elsewhere",
    }
    assert summary["ranking"]["groups"] == 1
    assert set(summary["filled"]) == set(summary["stated"])


def test_the_baseline_has_one_constant_per_device_and_precision() -> None:
    """Two like rows of 1.0 and 3.0 s: the median efficiency is the mean of both."""
    found = outcomes(build_cases([row(value=1.0), row(value=3.0)]))
    errors = baseline_errors([o for o in found if isinstance(o, Outcome)])
    assert errors == pytest.approx([0.5, -0.5])  # predicted 1 / mean(1, 1/3) = 1.5 s


def test_no_row_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="abacus"):
        validate([row(hardware="abacus")])


def test_sources_name_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word in the source before one in the reference, a release before none, longer words."""
    entries = {
        "a-h100": ("nemo",),
        "b-h100": ("nemo@25.04",),
        "c-h100": ("nemo-launcher",),
        "d-h100": ("torchtitan",),
    }
    stacks = tuple(
        Stack(name=name, gemm_efficiency={"bf16": 0.7}, sources=words)
        for name, words in entries.items()
    )
    monkeypatch.setattr(stacks_for, "_stacks_of", lambda family: stacks)

    def named(source: str, ref: str = "", release: str = "") -> str | None:
        found = stack_named_for(Published(source, ref, release), "h100")
        return None if found is None else found.name

    assert named("nemo-24.07") == named("NeMo", release="24.07") == "a-h100"
    assert named("nemo-longseq", release="25.04.01") == "b-h100"
    assert named("nemo-launcher") == "c-h100"
    assert named("a-new-table", ref="pytorch/torchtitan docs, not NeMo's") == "d-h100"
    assert named("nemo", ref="pytorch/torchtitan") == "a-h100"
    assert named("nemology") is None


def test_a_layout_chooses_the_stack_where_no_source_does() -> None:
    assert stack_for_layout("h100", tp=8, pp=1, zero=1).name == "megatron-h100"
    assert stack_for_layout("h100", tp=1, pp=1, zero=1).name == "megatron-h100"
    assert stack_for_layout("h100", tp=8, pp=1, zero=3).name == "pytorch-fsdp-h100"
    assert stack_for_layout("h100", tp=1, pp=1, zero=0).name == "pytorch-fsdp-h100"
    assert stack_for_layout("v100", tp=8, pp=1, zero=0).name == "megatron"
    assert stack_for_layout("v100", tp=1, pp=1, zero=3).name == "pytorch-fsdp"


def test_every_source_that_a_stack_names_finds_a_stack() -> None:
    """No entry of the catalog is hidden by another of its family."""
    for name in catalog_names("stacks"):
        stack, family = load_stack(name), name.rpartition("-")[2]
        for entry in stack.sources:
            word, _, release = entry.partition("@")
            assert stack_named_for(Published(word, "", release), family) is not None, entry


def test_a_stack_column_overrides() -> None:
    (candidate,) = candidates(case(source="llm-foundry", stack="pytorch-fsdp"))
    assert candidate.plan.cluster.pools[0].stack.name == "pytorch-fsdp-h100"


def test_a_plan_that_ran_is_not_refused() -> None:
    """Our own plans may not have a batch that does not divide; published ones do."""
    (candidate,) = candidates(case(micro_batch_seqs=3))
    assert candidate.micro_batches == pytest.approx(4 / 3)
    assert price(candidate).step_s.median > 0
    assert msgspec.json.encode(candidate.plan)
