"""Adapters on frozen weights: parameters, FLOPs, saved bytes and 4-bit storage of one layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.catalogs import load_model
from forerun.cluster import DTYPE_BYTES
from forerun.costmodel.graph import Graph, Sizes, volume
from forerun.costmodel.layers import decoder_layer, embedding, head
from forerun.costmodel.layout import local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import apply, local_axes

from .graphs import layouts_of

SEQ, HIDDEN, FFN, RANK = 4096, 4096, 11008, 16
LLAMA = load_model("llama-2-7b")
LORA = Options(compute="bf16", lora_rank=RANK)
QLORA = Options(compute="bf16", lora_rank=RANK, base_dtype="nf4")


def layer(options: Options, tp: int = 1) -> tuple[Graph, Sizes]:
    """A Llama-2-7B layer under its options, with its sizes; one sequence."""
    graph = decoder_layer(
        LLAMA, LLAMA.layers[0], sequence_parallel=False, fused=True, options=options
    )
    sizes = local_sizes(LLAMA, LLAMA.layers[0], layouts_of(tp=tp), SEQ)
    return apply(graph, options), local_axes(sizes, options)


@given(rank=st.integers(1, 256))
def test_adapters_have_rank_times_in_plus_out_parameters(rank: int) -> None:
    """4 attention projections h x h, three of the MLP h x f; the base stays, frozen."""
    graph, sizes = layer(Options(compute="bf16", lora_rank=rank))
    adapters = rank * (4 * 2 * HIDDEN + 3 * (HIDDEN + FFN))
    assert graph.num_params(sizes, trainable=True)[0] == adapters
    assert graph.num_params(sizes)[0] == adapters + LLAMA.layers[0].num_params(HIDDEN)


def test_size_of_rank_16_adapters_of_llama_7b() -> None:
    """39,976,960 parameters on all seven linears: 32 layers of
    16 * (4 * 8192 + 3 * 15104)."""
    graph, sizes = layer(LORA)
    assert LLAMA.num_layers * graph.num_params(sizes, trainable=True)[0] == 39_976_960


def test_embedding_and_head_are_frozen() -> None:
    _, sizes = layer(LORA)
    for graph in (
        embedding(LLAMA, sequence_parallel=True),
        head(LLAMA, sequence_parallel=True, fused=True),
    ):
        frozen = apply(graph, LORA)
        assert frozen.num_params(sizes, trainable=True)[0] == 0
        assert frozen.num_params(sizes)[0] == apply(graph, Options(compute="bf16")).num_params(
            sizes
        )


def test_nothing_runs_in_the_embeddings_backward() -> None:
    graph = apply(embedding(LLAMA, sequence_parallel=True), LORA)
    shape = [np.array([float(n)]) for n in (SEQ, HIDDEN, LLAMA.vocab)]
    for op in graph.operators:
        assert op.backward_collectives == ()
        assert op.saves == ()
        if op.kind != "edge":
            assert KINDS[op.kind].backward_bytes(shape, 2.0)[0] == 0


def test_the_heads_matmul_keeps_no_input_for_a_weight_gradient() -> None:
    graph = apply(head(LLAMA, sequence_parallel=False, fused=True), LORA)
    assert {op.name: [t.name for t in op.saves] for op in graph.operators}["head"] == []


def test_adapters_save_what_the_linears_saved_and_their_own_middle() -> None:
    """16-bit (tokens, rank) for each of the seven."""
    (graph, sizes), (plain, _) = layer(LORA), layer(Options(compute="bf16"))
    extra = liveness(graph, sizes).saved - liveness(plain, sizes).saved
    assert extra[0] == 7 * RANK * 2 * SEQ
    base = [op for op in graph.operators if op.kind == "linear" and not op.weights[0].trainable]
    assert len(base) == 7
    assert all(op.saves == () for op in base)


def test_flops_of_the_adapters() -> None:
    graph, sizes = layer(LORA)
    flops = sum(
        float(KINDS["linear"].forward_flops([volume(axes, sizes) for axes in op.price_axes])[0])
        for op in graph.operators
        if op.kind == "linear" and op.weights[0].trainable
    )
    assert flops == 2 * SEQ * RANK * (4 * 2 * HIDDEN + 3 * (HIDDEN + FFN))


@given(tp=st.sampled_from([1, 2, 4, 8]))
def test_adapters_add_no_collective(tp: int) -> None:
    graph, _ = layer(LORA, tp)
    plain, _ = layer(Options(compute="bf16"), tp)
    for side in ("forward_collectives", "backward_collectives"):
        assert [c for op in graph.operators for c in getattr(op, side)] == [
            c for op in plain.operators for c in getattr(op, side)
        ]


def test_linears_of_the_base_are_stored_in_four_bits() -> None:
    graph, _ = layer(QLORA)
    stored = {w.name for w in graph.weights if w.dtype == "nf4"}
    assert stored == {f"{n}.weight" for n in ("wq", "wk", "wv", "wo", "gate", "up", "down")}
    assert all(not w.trainable for w in graph.weights if w.dtype == "nf4")
    wide = {w.dtype for w in graph.weights if w.name not in stored}
    assert wide == {"bf16"}


def test_four_bit_weights_are_converted_before_their_matmuls() -> None:
    """4 bits and 0.127 bits of scales read, 2 B written, forward and backward."""
    assert DTYPE_BYTES["nf4"] * 8 == pytest.approx(4.127, abs=5e-4)  # QLoRA, section 3
    graph, sizes = layer(QLORA)
    names = [op.name for op in graph.operators]
    moved = np.zeros(2)
    for op in graph.operators:
        if op.kind == "dequantize":
            assert names[names.index(op.name) + 1] == op.name.removesuffix(".weight.dequantize")
            shape = [volume(axes, sizes) for axes in op.price_axes]
            moved[0] += KINDS[op.kind].forward_bytes(shape, 2.0)[0]
            moved[1] += KINDS[op.kind].backward_bytes(shape, 2.0)[0]
    weights = 4 * HIDDEN**2 + 3 * HIDDEN * FFN
    assert moved == pytest.approx((2 + DTYPE_BYTES["nf4"]) * weights)


def test_a_low_precision_base_keeps_its_adapters_in_16_bits() -> None:
    graph, _ = layer(Options(compute="fp8", lora_rank=RANK))
    by_trainable = {
        (op.weights[0].trainable, op.compute) for op in graph.operators if op.kind == "linear"
    }
    assert by_trainable == {(False, "fp8"), (True, None)}
