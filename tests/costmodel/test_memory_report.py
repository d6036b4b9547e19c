"""Memory in detail: every pipeline rank, and what is kept by tensor, add up to the estimate."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forerun.costmodel import estimate, memory_report
from forerun.estimate import MEMORY_TERMS
from forerun.plan import Plan

from .changed import with_stack, with_technique

MakePlan = Callable[..., Plan]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-v"])
def test_the_fullest_rank_is_the_estimates(make_plan: MakePlan, schedule: str) -> None:
    chunks = 2 if schedule in ("interleaved", "zb-v") else 1
    plan = make_plan(pp=4, vpp=chunks, dp_replicate=2, schedule=schedule, global_batch_seqs=32)
    report, result = memory_report(plan), estimate(plan)
    assert [r.rank for r in report.ranks] == [0, 1, 2, 3]
    for rank in report.ranks:
        assert tuple(rank.terms_bytes) == MEMORY_TERMS
        assert sum(rank.terms_bytes.values()) == pytest.approx(rank.peak_bytes)
    fullest = report.ranks[report.fullest]
    assert fullest.peak_bytes == max(r.peak_bytes for r in report.ranks)
    assert fullest.peak_bytes == pytest.approx(result.peak_memory_bytes.median)
    assert fullest.terms_bytes == pytest.approx(result.memory_terms_bytes)


def test_1f1b_keeps_less_on_every_later_rank(make_plan: MakePlan) -> None:
    report = memory_report(make_plan(pp=4, dp_replicate=2, global_batch_seqs=32))
    kept = [rank.terms_bytes["activations"] for rank in report.ranks]
    assert kept == sorted(kept, reverse=True)


def test_kept_tensors_of_a_layer(make_plan: MakePlan) -> None:
    """Korthikanti 2022's 34 sbh, less the dropouts' 4 sbh that our layers do not have and more for
    the statistics of norms and of attention."""
    plan = make_plan("gpt-22b", seq_tokens=2048, global_batch_seqs=8, dp_replicate=8)
    report = memory_report(plan)
    layer = {k.tensor: k.bytes for k in report.kept if k.piece == "layer"}
    tokens_hidden = 2048 * plan.model.hidden
    assert layer["q0"] == layer["o"] == 2 * tokens_hidden
    assert layer["up"] == 8 * tokens_hidden
    assert 28 <= sum(layer.values()) / tokens_hidden <= 34
    assert {k.times for k in report.kept if k.piece == "layer"} == {float(plan.model.num_layers)}


def test_recomputed_layers_keep_their_input_and_offloaded_ones_a_part(make_plan: MakePlan) -> None:
    full = memory_report(make_plan(dp_shard=8, zero=3, recompute="full"))
    assert [k.tensor for k in full.kept if k.piece == "layer"] == ["x"]
    plan = make_plan(dp_shard=8, zero=3)
    half = memory_report(with_technique(plan, "offload", activations=0.5))
    whole = memory_report(plan)

    def kept(report: object) -> float:
        return sum(k.bytes for k in report.kept if k.piece == "layer")  # pyright: ignore

    assert kept(half) == pytest.approx(kept(whole) / 2)
    assert any(k.tensor == "(kept otherwise)" and k.bytes < 0 for k in half.kept)


def test_what_a_stack_keeps_besides_is_named(make_plan: MakePlan) -> None:
    plan = with_stack(make_plan(dp_shard=8, zero=3), activation_multiplier=1.5)
    (other,) = (k for k in memory_report(plan).kept if k.tensor == "(kept otherwise)")
    layer = [k.bytes for k in memory_report(plan).kept if k.piece == "layer"]
    assert other.bytes == pytest.approx(sum(layer) / 3)
