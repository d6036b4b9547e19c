"""The model of a row: its shape columns, and the catalog's entry for what they do not say."""

from __future__ import annotations

import functools
import re

import msgspec

from ...catalogs import load_model
from ...catalogs.loader import resolve_name
from ...catalogs.sizes import parse_count
from ...errors import InputError
from ...model import Experts, Layer, Mlp, Model
from ...stack import Stack
from .table import Row

SHAPE = ("layers", "hidden", "heads", "ffn_hidden", "vocab")
"""Columns that a model without a catalog entry needs."""
MLPS: dict[str, Mlp] = {
    "swiglu": "swiglu", "swiglu_moe": "swiglu", "gelu": "gelu", "squared_relu": "squared_relu",
}  # fmt: skip


def model_of(row: Row) -> Model:
    """The model of a row; where catalog and columns both give a size, the column's counts."""
    base = _catalog_model(row.model)
    if base is None:
        missing = [column for column in SHAPE if getattr(row, column) is None]
        if missing:
            raise InputError("model", row.model, f"not in the catalog, and no {', '.join(missing)}",
                             "fill the shape columns or use a catalog name")  # fmt: skip
        base = _from_columns(row)
    hidden = row.hidden or base.hidden
    layers = tuple(_layer(row, layer, base.hidden, hidden) for layer in base.layers)
    tied = {"0": False, "1": True}.get(row.note("tied_embed") or "", base.tied_embeddings)
    return msgspec.structs.replace(
        base,
        hidden=hidden,
        vocab=row.vocab or base.vocab,
        layers=_counted(row, layers),
        tied_embeddings=tied,
        max_positions=row.seq_len if base.positions == "learned" else base.max_positions,
    )


def padded(model: Model, tp: int, stack: Stack) -> Model:
    """The model with a vocabulary that tp divides, and 8 where the stack sees to it: otherwise up
    to a multiple of 128 tp.

    That is what Megatron-LM's `--make-vocab-size-divisible-by 128` does.
    """
    if model.vocab % tp == 0 and not (stack.pads_vocab and model.vocab % 8):
        return model
    step = 128 * tp
    return msgspec.structs.replace(model, vocab=-(-model.vocab // step) * step)


@functools.cache
def _catalog_model(name: str) -> Model | None:
    """The catalog's model, or a standard one for a size such as 7b; a cell never names a file."""
    known = resolve_name("models", name) is not None or parse_count(name) is not None
    return load_model(name) if known else None


def _from_columns(row: Row) -> Model:
    """A decoder of the row's shape; norm, positions and biases as is usual for its MLP: assumed.

    SwiGLU and squared ReLU go with rotary positions and no biases (Llama, Nemotron), GELU with
    learned positions and biases (GPT); RMSNorm goes with SwiGLU alone.
    """
    if row.says("MLA attention"):
        raise InputError("model", row.model, "has latent attention and is not in the catalog",
                         "use a catalog name")  # fmt: skip
    assert row.layers and row.hidden and row.heads and row.ffn_hidden and row.vocab
    mlp = _mlp(row) or "swiglu"
    layer = Layer(
        repeat=row.layers,
        heads=row.heads,
        kv_heads=row.kv_heads or row.heads,
        head_dim=_head_dim(row, row.hidden, row.heads),
        ffn_hidden=row.ffn_hidden,
        mlp=mlp,
        norm="rmsnorm" if mlp == "swiglu" else "layernorm",
        bias=mlp == "gelu",
        experts=_experts(row),
    )
    groups: tuple[Layer, ...] = (layer,)
    dense = re.search(r"first (\d+) layers dense ffn (\d+)", row.notes)
    if layer.experts is not None and dense is not None and int(dense[1]) < row.layers:
        first, width = int(dense[1]), int(dense[2])
        plain = msgspec.structs.replace(layer, repeat=first, ffn_hidden=width, experts=None)
        groups = (plain, msgspec.structs.replace(layer, repeat=row.layers - first))
    return Model(
        name=row.model,
        hidden=row.hidden,
        vocab=row.vocab,
        layers=groups,
        positions="learned" if mlp == "gelu" else "rope",
        source="shape columns of the table; norm, positions and biases assumed",
    )


def _mlp(row: Row) -> Mlp | None:
    name = row.note("mlp")
    if name is None:
        return None
    if name not in MLPS:
        raise InputError("mlp", name, "unknown kind of MLP", f"use {', '.join(MLPS)}")
    return MLPS[name]


def _head_dim(row: Row, hidden: int, heads: int) -> int:
    stated = re.search(r"head_dim=?(\d+)", row.notes)
    if stated is not None:
        return int(stated[1])
    if hidden % heads:
        raise InputError("heads", heads, f"does not divide hidden={hidden}", "correct the shape")
    return hidden // heads


def _experts(row: Row) -> Experts | None:
    """Routed experts as the note `moe=128 experts,top8,1 shared` gives them."""
    note = row.note("moe")
    if note is None:
        return None
    count, top = re.search(r"(\d+) experts", note), re.search(r"top-?(\d+)", note)
    if count is None or top is None or row.ffn_hidden is None:
        raise InputError("moe", note, "gives no experts, top-k or ffn_hidden",
                         "write moe=128 experts,top8 and fill ffn_hidden")  # fmt: skip
    shared = re.search(r"(\d+) shared", note)
    return Experts(
        num_experts=int(count[1]),
        top_k=int(top[1]),
        ffn_hidden=row.ffn_hidden,
        shared_ffn_hidden=int(shared[1]) * row.ffn_hidden if shared else 0,
    )


def _layer(row: Row, layer: Layer, base_hidden: int, hidden: int) -> Layer:
    """A layer group of the base with the row's sizes."""
    heads = row.heads or layer.heads
    same = heads == layer.heads and hidden == base_hidden
    kv_heads = row.kv_heads or (layer.kv_heads if row.heads in (None, layer.heads) else heads)
    changed = msgspec.structs.replace(
        layer,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=layer.head_dim if same else _head_dim(row, hidden, heads),
        mlp=_mlp(row) or layer.mlp,
    )
    if row.ffn_hidden is None:
        return changed
    if layer.experts is None:
        grouped = row.note("moe") is not None  # the column is then an expert's width
        return changed if grouped else msgspec.structs.replace(changed, ffn_hidden=row.ffn_hidden)
    stated = _experts(row)
    experts = msgspec.structs.replace(
        layer.experts,
        ffn_hidden=row.ffn_hidden,
        num_experts=stated.num_experts if stated else layer.experts.num_experts,
        top_k=stated.top_k if stated else layer.experts.top_k,
    )
    return msgspec.structs.replace(changed, experts=experts)


def _counted(row: Row, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The groups with the row's number of layers; the last group gives or takes."""
    total = sum(layer.repeat for layer in layers)
    if row.layers in (None, total):
        return layers
    last = layers[-1].repeat + row.layers - total
    if last < 1:
        raise InputError("layers", row.layers, f"fewer than the first groups of {row.model}",
                         "correct the cell")  # fmt: skip
    return (*layers[:-1], msgspec.structs.replace(layers[-1], repeat=last))
