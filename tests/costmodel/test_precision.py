"""Matmuls and stored activations below 16 bits: casts, dtypes and bytes of one layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.catalogs import load_model
from forerun.costmodel.graph import Graph, Sizes, volume
from forerun.costmodel.layers import decoder_layer, embedding, head
from forerun.costmodel.layout import local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import apply

from .graphs import layouts_of

SEQ, HIDDEN, HEADS, FFN = 4096, 4096, 32, 11008
LLAMA = load_model("llama-2-7b")


def layer(options: Options, *, fused: bool = True) -> tuple[Graph, Sizes]:
    """A Llama-2-7B layer under its options, with its sizes; one sequence."""
    graph = decoder_layer(
        LLAMA, LLAMA.layers[0], sequence_parallel=False, fused=fused, options=options
    )
    return apply(graph, options), local_sizes(LLAMA, LLAMA.layers[0], layouts_of(), SEQ)


def traffic(graph: Graph, sizes: Sizes, kind: str) -> tuple[float, float]:
    """Bytes moved by all operators of a kind, forward and backward."""
    forward = backward = 0.0
    for op in graph.operators:
        if op.kind == kind:
            shape = [volume(axes, sizes) for axes in op.price_axes]
            forward += float(KINDS[kind].forward_bytes(shape, 1.0)[0])
            backward += float(KINDS[kind].backward_bytes(shape, 1.0)[0])
    return forward, backward


low = st.sampled_from(["fp8", "mxfp8", "nvfp4"])


@given(compute=low, recipe=st.sampled_from(["tensorwise", "rowwise", "coat"]))
def test_each_distinct_input_is_quantised_once(compute: str, recipe: str) -> None:
    graph, _ = layer(Options(compute=compute, recipe=recipe))
    casts = [op for op in graph.operators if op.kind.startswith("quantize")]
    inputs = [op.inputs[0].name for op in casts]
    assert inputs == ["attention.in", "o", "mlp.in", "activation"]
    assert all(not op.grad_inputs for op in casts)
    names = [op.name for op in graph.operators]
    readers = [op for op in graph.operators if op.compute is not None]
    assert {op.inputs[0].name for op in readers} == set(inputs)
    for op in readers:
        assert names.index(f"{op.inputs[0].name}.quantize") < names.index(op.name)


@pytest.mark.parametrize(("compute", "rate"), [("fp8", "fp8"), ("mxfp8", "fp8"), ("nvfp4", "fp4")])
def test_linears_alone_run_in_low_precision(compute: str, rate: str) -> None:
    graph, _ = layer(Options(compute=compute))
    assert {op.kind for op in graph.operators if op.compute is not None} == {"linear"}
    assert {op.compute for op in graph.operators if op.kind == "linear"} == {rate}
    between = {t.dtype for op in graph.operators if op.kind == "linear" for t in op.outputs}
    assert between == {"bf16"}


@pytest.mark.parametrize("compute", ["fp8", "mxfp8", "nvfp4"])
def test_embedding_and_head_stay_in_16_bits(compute: str) -> None:
    for graph in (
        embedding(LLAMA, sequence_parallel=False),
        head(LLAMA, sequence_parallel=False, fused=True),
    ):
        assert apply(graph, Options(compute=compute)) == apply(graph, Options(compute="bf16"))


@pytest.mark.parametrize(
    ("recipe", "forward", "backward"), [("tensorwise", 5, 7), ("rowwise", 7, 9)]
)
def test_bytes_of_the_casts(recipe: str, forward: int, backward: int) -> None:
    """Inputs of the four matmuls forward; gradients of seven outputs backward."""
    kind = {"tensorwise": "quantize", "rowwise": "quantize_rowwise"}[recipe]
    moved = traffic(*layer(Options(compute="fp8", recipe=recipe)), kind)
    inputs, outputs = 3 * HIDDEN + FFN, 5 * HIDDEN + 2 * FFN
    assert moved == (forward * inputs * SEQ, backward * outputs * SEQ)


@given(compute=low)
def test_low_precision_matmuls_change_no_parameter_and_no_saved_byte(compute: str) -> None:
    graph, sizes = layer(Options(compute=compute))
    wide, _ = layer(Options(compute="bf16"))
    assert graph.num_params(sizes) == wide.num_params(sizes) == LLAMA.layers[0].num_params(HIDDEN)
    assert liveness(graph, sizes).saved == liveness(wide, sizes).saved


COAT = Options(compute="fp8", recipe="coat", activations="fp8")


@pytest.mark.parametrize("fused", [True, False])
def test_matches_coat_ledger_of_a_llama_block(fused: bool) -> None:
    """In units of 2h bytes per token: norm inputs 2 * 9/16, their outputs 2 * 1/2, q, k, v and o 4,
    gate, up and silu 3 f/h * 9/16, product f/h * 1/2; 12.0 in all, and fp32 statistics."""
    graph, sizes = layer(COAT, fused=fused)
    units = 2 * 9 / 16 + 2 / 2 + 4 + FFN / HIDDEN * (3 * 9 / 16 + 1 / 2)
    assert units == pytest.approx(12.0, abs=0.01)
    expected = (units * 2 * HIDDEN + 4 * HEADS + 2 * 4) * SEQ
    assert float(liveness(graph, sizes).saved[0]) == pytest.approx(expected, rel=1e-12)


def test_stored_activations_are_converted_once_each_way() -> None:
    """Norm inputs and the three tensors of SwiGLU at 2 + 9/8 B; linears have their fp8 operands."""
    elements = (2 * HIDDEN + 3 * FFN) * SEQ
    assert traffic(*layer(COAT), "quantize_store") == (3.125 * elements, 3.125 * elements)
    wide = Options(compute="bf16", activations="fp8")
    operands = (2 * HIDDEN + FFN) * SEQ
    assert traffic(*layer(wide), "quantize_store")[0] == 3.125 * (elements + operands)


def test_saved_tensors_are_the_same_with_and_without_fp8_matmuls() -> None:
    graph, sizes = layer(COAT)
    wide, _ = layer(Options(compute="bf16", activations="fp8"))
    assert liveness(graph, sizes).saved == liveness(wide, sizes).saved


def test_casts_count_inputs_forward_and_gradients_backward() -> None:
    shape = [np.array([3.0]), np.array([10.0]), np.array([20.0])]
    assert KINDS["quantize"].forward_bytes(shape, 2.0)[0] == 5 * 3
    assert KINDS["quantize"].backward_bytes(shape, 2.0)[0] == 7 * 30
