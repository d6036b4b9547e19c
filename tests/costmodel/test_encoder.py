"""Encoders and decoders that look at them: parameters, FLOPs and kept bytes by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from forerun.catalogs import load_model
from forerun.costmodel import estimate
from forerun.costmodel.liveness import liveness
from forerun.errors import InputError
from forerun.layout_rules import layout_problems
from forerun.mesh import Mesh
from forerun.plan import Plan

from .graphs import forward_flops, moved, num_bytes
from .stacks import assert_bound_holds, degrees, piece, whole

MakePlan = Callable[..., Plan]
H, A, D, F = 1024, 32, 128, 16384
"""T5-3B (arXiv 1910.10683, section 3.7)."""
SOURCE, TARGET = 512, 114


@pytest.mark.parametrize("name", ["t5-small", "t5-11b", "t5-v1.1-xl", "bert-base", "bert-large"])
def test_graphs_agree_with_the_model(name: str) -> None:
    model = load_model(name)
    params, flops = whole(name, SOURCE)
    assert params == model.num_params
    assert 3 * flops == pytest.approx(model.flops_per_sample(SOURCE))


def test_an_encoder_layer_works_through_the_whole_square() -> None:
    """2 matmuls of 2 s^2 a d each; a causal layer of the same sizes does half."""
    graph, sizes = piece("t5-3b", "layer", SOURCE)
    assert forward_flops(graph, sizes, ("attention_full",)) == 4 * SOURCE**2 * A * D
    decoder, sizes = piece("t5-3b", "layer", SOURCE, group=1)
    assert forward_flops(decoder, sizes, ("attention",)) == 2 * TARGET**2 * A * D


def test_cross_attention_flops() -> None:
    """Scores of every target with every source token, and four projections."""
    graph, sizes = piece("t5-3b", "layer", SOURCE, group=1)
    assert forward_flops(graph, sizes, ("attention_full",)) == 4 * TARGET * SOURCE * A * D
    linears = 2 * TARGET * H * (6 * A * D + 2 * F) + 2 * SOURCE * H * 2 * A * D
    assert forward_flops(graph, sizes, ("linear",)) == linears


def test_saved_bytes_of_a_bert_layer() -> None:
    """16-bit: x, its norm, Q, K, V, O, x1, its norm: 16 h; up and its GELU: 4 f; fp32: 4 a + 16."""
    graph, sizes = piece("bert-large", "layer", 512)
    assert float(liveness(graph, sizes).saved[0]) == 512 * (16 * 1024 + 4 * 4096 + 4 * 16 + 16)


def test_saved_bytes_of_a_cross_decoder_layer() -> None:
    """The encoder's output is no layer's own; K and V of it are."""
    graph, sizes = piece("t5-3b", "layer", SOURCE, group=1)
    own = 12 * H + 12 * A * D + 8 * A + 12 + 2 * F
    assert float(liveness(graph, sizes).saved[0]) == TARGET * own + SOURCE * 4 * A * D


def test_the_encoder_output_is_kept_once_with_the_inputs() -> None:
    """x and its norm of the last encoder layer, the biases by distance, and ids of both stacks."""
    graph, sizes = piece("t5-3b", "embedding", SOURCE)
    source = SOURCE * (4 * H + 4)
    biases = sum(n**2 * (2 * A + 8) for n in (SOURCE, TARGET))
    assert float(liveness(graph, sizes).saved[0]) == source + biases + 8 * (SOURCE + TARGET)


def test_tensor_parallel_traffic_of_a_cross_decoder_layer() -> None:
    """Three blocks: an all-reduce each of s h out of them and, in backward, into them; one more of
    the encoder's output."""
    graph, sizes = piece("t5-3b", "layer", SOURCE, group=1, tp=2)
    target, source = TARGET * H * 2, SOURCE * H * 2
    assert num_bytes(moved(graph, "tp"), sizes) == 3 * target
    assert num_bytes(moved(graph, "tp", "backward"), sizes) == 3 * target + source


def test_lengths_follow_the_workload() -> None:
    model = load_model("t5-3b")
    assert model.lengths(512) == (114, 512)
    assert model.flops_per_sample(1024) > 2 * model.flops_per_sample(512)
    assert model.flops_per_token(512) * 512 == pytest.approx(model.flops_per_sample(512))


@given(options=degrees(sp=True), model=st.sampled_from(["t5-large", "bert-large", "t5-v1.1-xl"]))
@settings(max_examples=12)
def test_bound_never_exceeds_the_simulator(
    make_plan: MakePlan, options: dict[str, Any], model: str
) -> None:
    plan = make_plan(model, "2x8xA100", seq_tokens=512, global_batch_seqs=128, **options)
    assert_bound_holds(plan)


@pytest.mark.parametrize("recompute", ["none", "selective", "per_op", "full"])
def test_terms_sum_to_the_whole(make_plan: MakePlan, recompute: str) -> None:
    plan = make_plan("t5-large", seq_tokens=512, tp=2, dp_shard=4, zero=3, recompute=recompute)
    result = estimate(plan)
    assert sum(result.time_terms_s.values()) == pytest.approx(result.step_s.median)
    assert sum(result.memory_terms_bytes.values()) == pytest.approx(result.peak_memory_bytes.median)


def test_context_parallelism_is_refused_for_cross_attention() -> None:
    problems = layout_problems(
        load_model("t5-3b"), Mesh(cp=2), seq_tokens=2048, zero=0, sequence_parallel=False,
        schedule="1f1b", num_microbatches=1,
    )  # fmt: skip
    assert any("attention over an encoder's output" in str(problem) for problem in problems)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layers": ()}, "layers"),
        ({"vocab": 0}, "vocab"),
        ({"head": "classifier"}, "num_classes"),
        ({"head": "diffusion"}, "head"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        replace(load_model("t5-small"), **changes)


def test_a_cross_decoder_needs_an_encoder() -> None:
    model = load_model("t5-small")
    with pytest.raises(InputError, match="without an encoder"):
        replace(model, layers=(replace(model.layers[1], stack=0),))
