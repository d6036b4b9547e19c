"""Step time <-> the metric that a row prints, with the FLOPs that its source counts.

The same run differs by a third between tables, because they count different FLOPs. Per token,
forward and backward, with L layers of hidden size h, W weights in a layer's matmuls, a heads of
size d, sequence s, vocabulary V and N parameters:

    matmul   6 (L W + h V) + A,   A = 12 L a d s (attention whole) or 6 L a d s (causal: halved)
    params   6 N + A
    hardware 6 (L W 4/3 + h V) + A 4/3: full recomputation runs the layers' forward twice

Which one a source uses: `CONVENTIONS`, checked against rows that print two metrics. Other sources
get the matmul count with whole attention and no recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...cluster import Device
from ...model import Layer, Model
from ...units import GIB
from .table import Row

GB = 10**9
RECOMPUTED = 4 / 3
"""FLOPs of a layer with its forward run twice, over those with it run once."""
Attention = Literal["whole", "causal", "none"]
ATTENTION_FACTOR: dict[str, float] = {"whole": 1.0, "causal": 0.5, "none": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """What a source counts as FLOPs."""

    count: Literal["matmul", "params"] = "matmul"
    attention: Attention = "whole"
    hardware: bool = False
    """Whether full recomputation is counted."""


DEFAULT = Convention()
CONVENTIONS: dict[str, Convention] = {
    "llm-foundry": Convention(count="params"),
    "flashattention2": Convention(count="params"),
    "megatron-bridge": Convention(attention="causal"),
    "sc21-megatron": Convention(hardware=True),
    "sc21-zero-vs-ptdp": Convention(hardware=True),
    "deepspeed-azure": Convention(hardware=True),
}
"""By `source`; named in their documents or recomputed from rows that print tokens/s as well."""

PEAK_DTYPE = {"fp8": "fp8", "fp8_coat": "fp8", "mxfp8": "fp8", "nvfp4": "fp4", "fp32": "fp32"}
"""Dtype of the peak that MFU divides by; 16-bit otherwise."""


def convention_of(row: Row) -> Convention:
    """What the row's source counts; notes of the row itself go first."""
    found = CONVENTIONS.get(row.source.lower(), DEFAULT)
    if row.says("attention not counted"):
        return Convention(count=found.count, attention="none", hardware=found.hardware)
    return found


def layer_flops_per_token(model: Model, seq_tokens: int, attention: Attention) -> float:
    """Forward and backward of all layers, a multiply-add as two; routed experts as they are used.

    >>> from forerun.catalogs import load_model
    >>> h, s = 12288, 2048
    >>> round(layer_flops_per_token(load_model("gpt3-175b"), s, "whole") / (96 * 72 * h * h), 4)
    1.0278
    >>> round(1 + s / (6 * h), 4)  # Narayanan et al. 2021, the layers' part of equation 3
    1.0278
    """
    factor = ATTENTION_FACTOR[attention]
    return 6.0 * sum(
        layer.repeat
        * (_matmul_params(layer, model.hidden) + factor * _score_width(layer) * seq_tokens)
        for layer in model.layers
    )


def _matmul_params(layer: Layer, hidden: int) -> float:
    """Weights that one token meets in a layer's matmuls, biases and norms left out."""
    if layer.latent is not None:
        attention = float(layer.attention_params(hidden))
    else:
        attention = 2.0 * hidden * (layer.heads + layer.kv_heads) * layer.head_dim
    matrices = 3 if layer.mlp == "swiglu" else 2
    if layer.experts is None:
        return attention + matrices * hidden * layer.ffn_hidden
    e = layer.experts
    width = e.top_k * e.ffn_hidden + e.shared_ffn_hidden
    return attention + matrices * hidden * width + hidden * e.num_experts


def _score_width(layer: Layer) -> float:
    """Multiply-adds of one query with one key and its value."""
    if layer.latent is None:
        return 2.0 * layer.heads * layer.head_dim
    a = layer.latent
    return layer.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)


def head_flops_per_token(model: Model) -> float:
    """Forward and backward of the output head."""
    return 6.0 * model.hidden * model.vocab


def step_flops(row: Row, model: Model, global_batch_seqs: int) -> float:
    """FLOPs of one step as the row's source counts them."""
    counted = convention_of(row)
    if counted.count == "params":
        params = row.n_params_b * 1e9 if row.n_params_b else model.num_params
        attention = layer_flops_per_token(model, row.seq_len, counted.attention)
        attention -= layer_flops_per_token(model, row.seq_len, "none")
        per_token = 6.0 * params + attention
    else:
        layers = layer_flops_per_token(model, row.seq_len, counted.attention)
        layers *= RECOMPUTED if counted.hardware else 1.0
        per_token = layers + head_flops_per_token(model)
    return per_token * row.seq_len * global_batch_seqs


def peak_flops_per_s(row: Row, device: Device) -> float:
    """The peak that MFU divides by: dense, of the matmuls' dtype."""
    peaks = device.peak_flops_per_s
    return peaks.get(PEAK_DTYPE.get(row.precision, "bf16")) or max(peaks.values())


def work(row: Row, model: Model, device: Device, global_batch_seqs: int) -> float:
    """Metric times step time, for metrics that are rates: the row's metric is work / seconds."""
    if row.metric == "tokens_per_s_per_gpu":
        return row.seq_len * global_batch_seqs / row.gpus
    per_device = step_flops(row, model, global_batch_seqs) / row.gpus
    if row.metric == "tflops_per_gpu":
        return per_device / 1e12
    return 100.0 * per_device / peak_flops_per_s(row, device)


def memory_unit_bytes(row: Row) -> int:
    """Bytes of one unit of a memory value: GiB unless the notes say that GB is printed.

    A note that names GiB (`GB means GiB`) wins over one that names GB.
    """
    if "GiB" in row.notes:
        return GIB
    return GB if row.says("printed GB") or row.says("printed as GB") else GIB


def to_seconds(row: Row, value: float, rate_work: float) -> float:
    """The step time behind a value of the row's metric."""
    return value if row.metric == "iter_time_s" else rate_work / value


def from_seconds(row: Row, seconds: float, rate_work: float) -> float:
    """The row's metric at a step time (the same formula: a rate and a time swap places)."""
    return to_seconds(row, seconds, rate_work)
