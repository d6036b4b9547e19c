"""Latent attention of DeepSeek-V3 (arXiv 2412.19437, section 4.2) against arithmetic by hand."""

from __future__ import annotations

import msgspec
import pytest

from forerun.catalogs import load_model
from forerun.costmodel.graph import volume
from forerun.costmodel.layers import decoder_layer
from forerun.costmodel.layout import local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import recompute
from forerun.model import Model

from .graphs import forward_flops, layer_graph, layouts_of, moved, num_bytes

SEQ = 4096
H, HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V = 7168, 128, 1536, 512, 128, 64, 128
FFN = 18432


def _without_q_rank() -> Model:
    model = load_model("deepseek-v3")
    layer = model.layers[0]
    assert layer.latent is not None
    latent = msgspec.structs.replace(layer.latent, q_lora_rank=None)
    return msgspec.structs.replace(model, layers=(msgspec.structs.replace(layer, latent=latent),))


@pytest.mark.parametrize("model", [load_model("deepseek-v3"), _without_q_rank()])
def test_parameters_are_those_of_the_model(model: Model) -> None:
    layer = model.layers[0]
    graph = decoder_layer(
        model, layer, sequence_parallel=False, fused=True, options=Options(compute="bf16")
    )
    sizes = local_sizes(model, layer, layouts_of(), SEQ)
    others = {"attention_norm", "mlp_norm", "gate", "up", "down"}
    attention = sum(
        float(volume(w.axes, sizes)[0]) for w in graph.weights if w.name.split(".")[0] not in others
    )
    assert attention == layer.attention_params(model.hidden)
    assert float(graph.num_params(sizes)[0]) == layer.num_params(model.hidden)


def test_flops_of_projections_and_core() -> None:
    graph, sizes = layer_graph("deepseek-v3", SEQ)
    queries = H * Q_RANK + Q_RANK * HEADS * (NOPE + ROPE)
    keys_values = H * (KV_RANK + ROPE) + KV_RANK * HEADS * (NOPE + V)
    dense = queries + keys_values + HEADS * V * H + 3 * H * FFN
    assert forward_flops(graph, sizes, ("linear",)) == 2 * dense * SEQ
    # causal: half of 2 s^2 a (qk + v) FLOPs
    core = forward_flops(graph, sizes, ("attention",))
    assert core == SEQ * SEQ * HEADS * (NOPE + ROPE + V)


def test_tp_divides_heads_but_not_the_projections_down() -> None:
    graph, sizes = layer_graph("deepseek-v3", SEQ, tp=4)
    local = {w.name: float(volume(w.axes, sizes)[0]) for w in graph.weights}
    assert local["q_a.weight"] == H * Q_RANK
    assert local["kv_a.weight"] == H * (KV_RANK + ROPE)
    assert local["q_b.weight"] == Q_RANK * HEADS * (NOPE + ROPE) / 4
    assert local["kv_b.weight"] == KV_RANK * HEADS * (NOPE + V) / 4
    assert local["wo.weight"] == HEADS * V * H / 4


def test_sequence_parallelism_gathers_the_low_ranks() -> None:
    """Not the hidden states: 1536 + 512 + 64 numbers per token instead of 7168."""
    graph, sizes = layer_graph("deepseek-v3", SEQ, tp=4, sequence_parallel=1)
    gathered = [c for c in moved(graph, "tp") if c.kind == "all_gather"]
    mlp = SEQ * H * 2
    assert num_bytes(gathered, sizes) == SEQ * (Q_RANK + KV_RANK + ROPE) * 2 + mlp
    scattered = [c for c in moved(graph, "tp", "backward") if c.kind == "reduce_scatter"]
    assert num_bytes(scattered, sizes) == num_bytes(gathered, sizes)


def test_saved_activations_of_the_dense_layer() -> None:
    """Bytes per token of a layer with latent attention and a SwiGLU MLP."""
    graph, sizes = layer_graph("deepseek-v3", SEQ)
    norms = 4 * 2 * H + 2 * 4
    low = 2 * 2 * (Q_RANK + KV_RANK) + 2 * 4  # before and after their norms
    core = 2 * 2 * HEADS * (NOPE + ROPE) + 2 * 2 * HEADS * V + 4 * HEADS
    mlp = 4 * 2 * FFN  # gate, up, silu of gate, product
    assert liveness(graph, sizes).saved[0] / SEQ == norms + low + core + mlp


def test_elementwise_recompute_keeps_the_low_ranks_alone() -> None:
    """Norms and up-projections run again (arXiv 2412.19437, section 3.2.3): of attention stay its
    input, the low ranks before their norms, the rotary key, output and statistics."""
    graph, sizes = layer_graph("deepseek-v3", SEQ)
    again = recompute.rewrite(graph, "elementwise")
    attention = 2 * H + 2 * (Q_RANK + KV_RANK + ROPE) + 2 * HEADS * V + 4 * HEADS
    mlp = 2 * H + 2 * 2 * FFN  # its input, gate and up
    assert liveness(again, sizes).saved[0] / SEQ == attention + mlp
    names = {op.name for op in again.operators if op.recomputed}
    assert {"q_b", "kv_b", "attention_norm", "q_a_norm", "kv_a_norm"} <= names
    assert not {"q_a", "kv_a", "wo", "attention"} & names
